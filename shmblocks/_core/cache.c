/* Looking up a key: `find` and `get` of cache_state.py, over the index of key_index.py. */
#include "core.h"

#define KEY_WORDS (KEY_BYTES / WORD)
#define SHORT_KEY_BYTES 16

typedef struct {
    word words[KEY_WORDS];
} Stored;

static bool stored_key(PyObject *object, Stored *key)
{
    memset(key, 0, sizeof *key);
    if (!PyBytes_CheckExact(object))
        return false;
    Py_ssize_t size = PyBytes_GET_SIZE(object);
    if (size != SHORT_KEY_BYTES && size != KEY_BYTES)
        return false;
    memcpy(key->words, PyBytes_AS_STRING(object), (size_t)size);
    return true;
}

static bool is_under(const Core *c, word start, const Stored *key)
{
    const word *at = record_at(c, start) + R_KEY;
    for (int i = 0; i < KEY_WORDS; i++)
        if (get(at + i) != key->words[i])
            return false;
    return true;
}

/* Where the allocation under a key starts, NOWHERE: there is none; false: the chain is damaged, or
 * was seen in the middle of a change. */
static bool look_up(const Core *c, const Stored *key, word *start)
{
    word link = get(c->s.words + c->buckets + key->words[0] % c->total);
    for (word left = c->total; link; left--) {
        if (link > c->total || !left)
            return false;
        *start = link - 1;
        if (is_under(c, *start, key))
            return true;
        link = get(record_at(c, *start) + R_CHAIN);
    }
    *start = NOWHERE;
    return true;
}

static bool is_readable(const word record[BODY_WORDS])
{
    return record[R_STATE] == STATE_PUBLISHED || record[R_STATE] == STATE_LEASED;
}

/* find(key) -> the handle of a complete entry, False: there is none, None: Python's. Lock-free, as
 * `CacheState.find`. */
OPERATION(core_find)
{
    Stored key;
    word start, record[BODY_WORDS];
    if (n != 1 || !c->s.words || !stored_key(args[0], &key))
        Py_RETURN_NONE;
    const word *w = c->s.words;
    word changes = get(w + H_INDEX_CHANGES), journal = get(w + c->s.journal);
    if (!look_up(c, &key, &start))
        Py_RETURN_NONE;
    if (start == NOWHERE) {
        if (changes == get(w + H_INDEX_CHANGES) && journal == get(w + c->s.journal))
            Py_RETURN_FALSE;
        Py_RETURN_NONE;
    }
    if (!record_read(c, start, record) || !is_readable(record) || !is_under(c, start, &key)
        || record[R_READY] != record[R_GENERATION]
        || get(record_at(c, start) + R_GENERATION) != record[R_GENERATION])
        Py_RETURN_NONE;
    Handle h = { start, record[R_NUM_BLOCKS], record[R_NUM_TOKENS], record[R_GENERATION], 0 };
    return handle_new(c, &h);
}

typedef enum { MISS, HIT, PYTHONS } Answer;

/* Under the lock. `tokens`: any other number is Python's to count; 0: any. */
static Answer look(Core *c, const Stored *key, word tokens, const Claimant *claims, PyObject *made)
{
    Change ch = { .how_many = 0 };
    word start, record[BODY_WORDS];
    if (!look_up(c, key, &start))
        return PYTHONS;
    if (start == NOWHERE) {
        count(&c->s, COUNT_LOOKUPS, 1);
        count(&c->s, COUNT_MISSES, 1);
        return MISS;
    }
    Key its = { 0, 0, c->s.me, now_ns() };
    if (!record_read(c, start, record) || !can_open(record)
        || (tokens && tokens != record[R_NUM_TOKENS]) || (its.slot = free_lease(c)) == NOWHERE)
        return PYTHONS;
    Handle h = { start, record[R_NUM_BLOCKS], record[R_NUM_TOKENS], record[R_GENERATION], 0 };
    its.generation = h.generation;
    PyObject *handle = handle_new(c, &h);
    PyObject *lease = handle ? lease_new(c, claims, handle, &its, NULL, 0, made) : NULL;
    Py_XDECREF(handle);
    if (!lease)
        return PYTHONS;
    Py_DECREF(lease); /* `made` has it */
    count(&c->s, COUNT_LOOKUPS, 1);
    stores_to_open(c, &ch, start, record, its.slot, its.opened);
    commit(&c->s, ch.stores, ch.how_many);
    word *at = record_at(c, start);
    put(at + R_USED, now_ns());
    put(at + R_HITS, get(at + R_HITS) + 1);
    count(&c->s, COUNT_HITS, 1);
    count(&c->s, COUNT_OPENS, 1);
    return HIT;
}

/* get(key, num_tokens or None, means, owner, made) -> True: a lease is in the list `made`, False: a
 * miss, None: Python's */
OPERATION(core_get)
{
    Stored key;
    Claimant claims;
    word tokens = 0;
    if (n != 5 || !stored_key(args[0], &key) || (args[1] != Py_None && !(tokens = whole(args[1])))
        || !claimant(&claims, args[2], args[3]) || !PyList_CheckExact(args[4]) || !enter(&c->s))
        Py_RETURN_NONE;
    Answer answer = look(c, &key, tokens, &claims, args[4]);
    leave_pool(c);
    if (PyErr_Occurred())
        return NULL;
    if (answer == PYTHONS)
        Py_RETURN_NONE;
    return PyBool_FromLong(answer == HIT);
}
