/* The block table: what shmblocks/_state/blocks.py does with records, bitmap and leases.
 *
 * A function that says false, or NOWHERE, has seen something that Python is to look at. None of them
 * has stored anything by then, but for words that nobody reads before the commit says so.
 */
#include "core.h"

/* A copy of a record's body, unless a number in it leads outside of the pool. */
bool record_read(const Core *c, word block, word record[BODY_WORDS])
{
    const word *at = record_at(c, block);
    for (int i = 0; i < BODY_WORDS; i++)
        record[i] = get(at + i);
    return record[R_STATE] && record[R_STATE] < NUM_STATES && record[R_NUM_BLOCKS]
           && record[R_NUM_BLOCKS] <= c->total - block
           && record[R_NUM_TOKENS] <= record[R_NUM_BLOCKS] * c->block_size
           && record[R_LEASES] <= c->max_leases
           && !(record[R_STATE] == STATE_PUBLISHED && !record[R_READERS_LEFT])
           && record[R_LIVE_INDEX] < c->total;
}

bool find_exact(const Core *c, const Handle *h, word record[BODY_WORDS])
{
    return h->start < c->total && record_read(c, h->start, record)
           && record[R_GENERATION] == h->generation && record[R_NUM_BLOCKS] == h->blocks
           && record[R_NUM_TOKENS] == h->tokens;
}

/* ---- the bitmap ------------------------------------------------------------------------------ */

/* The first block at or behind `from` that is used, or (`flip` all ones) free; `end`: none. */
word next_block(const Core *c, word from, word end, word flip)
{
    const word *bitmap = c->s.words + c->bitmap;
    while (from < end) {
        word bits = (get(bitmap + from / 64) ^ flip) >> from % 64;
        if (bits) {
            word found = from + (word)__builtin_ctzll(bits);
            return found < end ? found : end;
        }
        from = (from | 63) + 1;
    }
    return end;
}

static word find_run(const Core *c, word from, word end, word blocks)
{
    while (from < end) {
        word start = next_block(c, from, end, ~(word)0);
        word most = blocks < end - start ? start + blocks : end;
        from = next_block(c, start, most, 0);
        if (from - start >= blocks)
            return start;
    }
    return NOWHERE;
}

/* Where the next run of free blocks starts at or behind `from`, which wraps. */
word search(const Core *c, word from, word blocks)
{
    word found = find_run(c, from, c->total, blocks);
    if (found == NOWHERE) {
        word end = from + blocks - 1;
        found = find_run(c, 0, end < c->total ? end : c->total, blocks);
    }
    return found;
}

/* The words of the bitmap around some blocks, with those set or cleared. */
Store marked(Core *c, word start, word blocks, bool used)
{
    word first = start / 64, last = (start + blocks - 1) / 64;
    for (word w = first; w <= last; w++) {
        word low = w == first ? start % 64 : 0, high = w == last ? (start + blocks - 1) % 64 : 63;
        word mask = (~(word)0 >> (63 - high)) & (~(word)0 << low);
        word bits = get(c->s.words + c->bitmap + w);
        c->bits[w - first] = used ? bits | mask : bits & ~mask;
    }
    return (Store){ c->bitmap + first, last - first + 1, c->bits };
}

/* ---- what changes a record ------------------------------------------------------------------- */

bool can_publish(const word record[BODY_WORDS])
{
    return record[R_STATE] == STATE_RESERVED && !record[R_LEASES];
}

void stores_to_publish(Core *c, Change *ch, word start, const word record[BODY_WORDS], word tokens,
                       word readers, word now, bool on_stream)
{
    if (!on_stream) /* before the commit, and no part of it */
        put(record_at(c, start) + R_READY, record[R_GENERATION]);
    memcpy(ch->record, record, RECORD_HEAD_WORDS * WORD);
    ch->record[R_STATE] = STATE_PUBLISHED;
    ch->record[R_NUM_TOKENS] = tokens;
    ch->record[R_READERS_LEFT] = readers;
    ch->record[R_PUBLISHED_NS] = now;
    change(ch, c->records + start * RECORD_WORDS, RECORD_HEAD_WORDS, ch->record);
    word unclaimed = get(c->s.words + H_UNCLAIMED);
    ch->until = now + c->unclaimed_ns;
    if (readers < UNBOUNDED && !(unclaimed && unclaimed <= ch->until))
        change(ch, H_UNCLAIMED, 1, &ch->until);
}

/* Whether a reader may have a lease now; a stream may still write. */
bool can_lease(const word record[BODY_WORDS])
{
    return (record[R_STATE] == STATE_PUBLISHED || record[R_STATE] == STATE_LEASED)
           && record[R_READERS_LEFT] && !(record[R_READY] & FAILED);
}

/* Whether a reader may open it now, and needs to wait for nothing. */
bool can_open(const word record[BODY_WORDS])
{
    return can_lease(record) && record[R_READY] == record[R_GENERATION];
}

word free_lease(Core *c)
{
    word hint = *next_lease(c);
    if (hint < c->max_leases && !get(lease_at(c, hint)))
        return hint;
    for (word slot = 0; slot < c->max_leases; slot++)
        if (!get(lease_at(c, slot)))
            return slot;
    return NOWHERE;
}

void stores_to_open(Core *c, Change *ch, word start, const word record[BODY_WORDS], word slot, word now)
{
    memcpy(ch->record, record, RECORD_HEAD_WORDS * WORD);
    ch->record[R_STATE] = STATE_LEASED;
    ch->record[R_READERS_LEFT] -= record[R_READERS_LEFT] < UNBOUNDED;
    ch->record[R_LEASES]++;
    memset(ch->lease, 0, sizeof ch->lease);
    ch->lease[L_GENERATION] = record[R_GENERATION];
    ch->lease[L_START_BLOCK] = start;
    ch->lease[L_HOLDER] = c->s.me;
    ch->lease[L_KIND] = READS;
    ch->lease[L_OPENED_NS] = now;
    change(ch, c->records + start * RECORD_WORDS, RECORD_HEAD_WORDS, ch->record);
    change(ch, c->leases + slot * LEASE_WORDS, LEASE_HEAD_WORDS, ch->lease);
    *next_lease(c) = slot + 1;
}

static const word zero;

/* The stores that give the blocks of an allocation without leases back. */
bool stores_to_free(Core *c, Change *ch, word start, const word record[BODY_WORDS])
{
    const word *w = c->s.words;
    word live = get(w + H_LIVE), moved = 0;
    /* Of an entry of the cache the chain changes too: Python's. */
    if (record[R_KEYED] || !live || live > c->total || get(w + H_WAITERS))
        return false;
    if (record[R_LIVE_INDEX] != live - 1) {
        moved = get(w + c->live + live - 1);
        if (moved >= c->total)
            return false;
    }
    ch->head[0] = get(w + H_CURSOR);
    ch->head[1] = get(w + H_NEXT_GENERATION);
    ch->head[2] = get(w + H_FREE_BLOCKS) + record[R_NUM_BLOCKS];
    ch->head[3] = live - 1;
    change(ch, H_CURSOR, HEAD_WORDS, ch->head);
    ch->stores[ch->how_many++] = marked(c, start, record[R_NUM_BLOCKS], false);
    change(ch, c->records + start * RECORD_WORDS, 1, &zero);
    if (record[R_LIVE_INDEX] != live - 1) {
        /* The last of the list takes the index that comes free. */
        ch->moved = moved;
        ch->live_index = record[R_LIVE_INDEX];
        change(ch, c->live + record[R_LIVE_INDEX], 1, &ch->moved);
        change(ch, c->records + moved * RECORD_WORDS + R_LIVE_INDEX, 1, &ch->live_index);
    }
    return true;
}

/* The stores that end a reader's lease which is in its slot, and the allocation with the last. */
bool stores_to_release(Core *c, Change *ch, const Key *key)
{
    const word *lease = lease_at(c, key->slot);
    word start = get(lease + L_START_BLOCK), record[BODY_WORDS];
    if (get(lease + L_KIND) != READS || get(lease + L_PENDING) || start >= c->total
        || !record_read(c, start, record) || record[R_GENERATION] != key->generation
        || !record[R_LEASES] || record[R_READY] != record[R_GENERATION]
        || (record[R_STATE] != STATE_LEASED && record[R_STATE] != STATE_DRAINING)
        || get(c->s.words + H_WAITERS))
        return false;
    word leases = record[R_LEASES] - 1, state = record[R_STATE];
    if (!leases)
        state = state == STATE_LEASED && record[R_READERS_LEFT] ? STATE_PUBLISHED : STATE_FREE;
    if (state == STATE_FREE) {
        if (!stores_to_free(c, ch, start, record))
            return false;
    } else {
        if (state == STATE_DRAINING && record[R_KEYED])
            return false;
        memcpy(ch->record, record, RECORD_HEAD_WORDS * WORD);
        ch->record[R_STATE] = state;
        ch->record[R_LEASES] = leases;
        change(ch, c->records + start * RECORD_WORDS, RECORD_HEAD_WORDS, ch->record);
    }
    change(ch, c->leases + key->slot * LEASE_WORDS, 1, &zero);
    *next_lease(c) = key->slot;
    return true;
}
