/* Reserving, publishing, opening, releasing, freeing: the transactions of pool_state.py.
 *
 * Each returns None when it has done nothing, and Python is to do it.
 */
#include "core.h"

/* `req_id` of a record: a Pascal string of 64 bytes; false: to be cut or refused by Python. */
static bool request_id(PyObject *object, word *out)
{
    Py_ssize_t size = 0;
    const char *text = "";
    if (object == Py_None)
        return true;
    if (PyBytes_CheckExact(object)) {
        text = PyBytes_AS_STRING(object);
        size = PyBytes_GET_SIZE(object);
    } else if (PyUnicode_CheckExact(object)) {
        text = PyUnicode_AsUTF8AndSize(object, &size);
    } else {
        return false;
    }
    if (!text || size > REQUEST_ID_BYTES) {
        PyErr_Clear();
        return false;
    }
    *(unsigned char *)out = (unsigned char)size;
    memcpy((char *)out + 1, text, (size_t)size);
    return true;
}

/* Under the lock: the handle, NULL: Python's, or (with an error) no memory. */
static PyObject *reserve(Core *c, Change *ch, Handle *h)
{
    word *w = c->s.words, free_blocks = get(w + H_FREE_BLOCKS), live = get(w + H_LIVE);
    word from = c->first_fit ? 0 : get(w + H_CURSOR);
    if (get(w + H_WAITERS) || h->blocks > free_blocks || from >= c->total || live >= c->total)
        return NULL;
    h->start = search(c, from, h->blocks);
    if (h->start == NOWHERE)
        return NULL;
    h->generation = get(w + H_NEXT_GENERATION);
    PyObject *handle = handle_new(c, h);
    if (!handle)
        return NULL;
    ch->head[0] = (h->start + h->blocks) % c->total;
    ch->head[1] = h->generation + 1;
    ch->head[2] = free_blocks - h->blocks;
    ch->head[3] = live + 1;
    ch->record[R_STATE] = STATE_RESERVED;
    ch->record[R_GENERATION] = h->generation;
    ch->record[R_NUM_BLOCKS] = h->blocks;
    ch->record[R_NUM_TOKENS] = h->tokens;
    ch->record[R_OWNER] = c->s.me;
    ch->record[R_LIVE_INDEX] = live;
    put(w + c->live + live, h->start); /* before the commit: nobody reads it before the count */
    change(ch, H_CURSOR, HEAD_WORDS, ch->head);
    ch->stores[ch->how_many++] = marked(c, h->start, h->blocks, true);
    change(ch, c->records + h->start * RECORD_WORDS, RECORD_WORDS, ch->record);
    commit(&c->s, ch->stores, ch->how_many);
    count(&c->s, COUNT_ALLOCATIONS, 1);
    return handle;
}

/* reserve(num_blocks, num_tokens, req_id, stamp) -> handle; num_blocks 0: as many as it takes */
OPERATION(core_reserve)
{
    Change ch = { .how_many = 0 };
    Handle h = { 0, 0, 0, 0, 0 };
    if (n != 4 || !(h.tokens = whole(args[1])) || !request_id(args[2], ch.record + R_REQUEST_ID)
        || !(ch.record[R_CREATED_NS] = moment(args[3])))
        Py_RETURN_NONE;
    h.blocks = whole(args[0]);
    if (!h.blocks)
        h.blocks = (h.tokens - 1) / c->block_size + 1;
    if (h.blocks > c->total || h.tokens > h.blocks * c->block_size || !enter(&c->s))
        Py_RETURN_NONE;
    PyObject *handle = reserve(c, &ch, &h);
    leave_pool(c);
    if (handle || PyErr_Occurred())
        return handle;
    Py_RETURN_NONE;
}

/* publish(handle, num_tokens, readers, whether on a stream) -> True */
OPERATION(core_publish)
{
    Change ch = { .how_many = 0 };
    Handle h;
    word tokens, readers, record[BODY_WORDS];
    if (n != 4 || !handle_read(c, args[0], &h) || !(tokens = whole(args[1]))
        || !(readers = whole(args[2])) || tokens > h.blocks * c->block_size || !enter(&c->s))
        Py_RETURN_NONE;
    bool done = find_exact(c, &h, record) && can_publish(record);
    if (done) {
        stores_to_publish(c, &ch, h.start, record, tokens, readers, now_ns(), args[3] == Py_True);
        commit(&c->s, ch.stores, ch.how_many);
        count(&c->s, COUNT_PUBLISHES, 1);
    }
    leave_pool(c);
    if (done)
        Py_RETURN_TRUE;
    Py_RETURN_NONE;
}

/* Under the lock: a lease, which is in `made` when it is open; NULL as in `reserve`. */
static PyObject *open_one(Core *c, const Handle *h, PyObject *handle, const Claimant *claims,
                          PyObject *made)
{
    Change ch = { .how_many = 0 };
    word record[BODY_WORDS], now = now_ns();
    Key key = { 0, h->generation, c->s.me, now };
    /* A claim that was announced to us by name is Python's to find. */
    if (!find_exact(c, h, record) || !can_open(record) || get(record_at(c, h->start) + R_ANNOUNCED)
        || (key.slot = free_lease(c)) == NOWHERE)
        return NULL;
    PyObject *lease = lease_new(c, claims, handle, &key, NULL, 0, made);
    if (!lease)
        return NULL;
    stores_to_open(c, &ch, h->start, record, key.slot, now);
    commit(&c->s, ch.stores, ch.how_many);
    count(&c->s, COUNT_OPENS, 1);
    observe(&c->s, HISTOGRAM_PUBLISH_TO_OPEN, record[R_PUBLISHED_NS], now);
    return lease;
}

/* open(handle, means, owner, made) -> lease, which is in the list `made` too */
OPERATION(core_open)
{
    Handle h;
    Claimant claims;
    if (n != 4 || !handle_read(c, args[0], &h) || !claimant(&claims, args[1], args[2])
        || !PyList_CheckExact(args[3]) || !enter(&c->s))
        Py_RETURN_NONE;
    PyObject *lease = open_one(c, &h, args[0], &claims, args[3]);
    leave_pool(c);
    if (lease || PyErr_Occurred())
        return lease;
    Py_RETURN_NONE;
}

/* lease(handle, moment) -> the words of a `LeaseKey`, and whether what is read is there already; for
 * a pool whose leases are ordered by streams. */
OPERATION(core_lease)
{
    Change ch = { .how_many = 0 };
    Handle h;
    word now, record[BODY_WORDS], slot;
    PyObject *taken = NULL;
    if (n != 2 || !handle_read(c, args[0], &h) || !(now = moment(args[1])) || !enter(&c->s))
        Py_RETURN_NONE;
    if (find_exact(c, &h, record) && can_lease(record) && !get(record_at(c, h.start) + R_ANNOUNCED)
        && (slot = free_lease(c)) != NOWHERE) {
        unsigned long long in[4] = { slot, h.generation, c->s.me, now };
        PyObject *is_ready = record[R_READY] == record[R_GENERATION] ? Py_True : Py_False;
        taken = Py_BuildValue("KKKKO", in[0], in[1], in[2], in[3], is_ready);
        if (taken) {
            stores_to_open(c, &ch, h.start, record, slot, now);
            commit(&c->s, ch.stores, ch.how_many);
            count(&c->s, COUNT_OPENS, 1);
            observe(&c->s, HISTOGRAM_PUBLISH_TO_OPEN, record[R_PUBLISHED_NS], now);
        }
    }
    leave_pool(c);
    if (taken || PyErr_Occurred())
        return taken;
    Py_RETURN_NONE;
}

/* release(lease) -> True; the lease is over then */
PyObject *core_release(Core *c, PyObject *lease)
{
    Change ch = { .how_many = 0 };
    Key key;
    int is_open = lease_key(lease, &key);
    if (!is_open)
        Py_RETURN_TRUE;
    if (is_open < 0 || key.holder != c->s.me || key.slot >= c->max_leases || !enter(&c->s))
        Py_RETURN_NONE;
    const word *at = lease_at(c, key.slot);
    bool is_there = get(at + L_GENERATION) == key.generation && get(at + L_HOLDER) == key.holder
                    && get(at + L_OPENED_NS) == key.opened;
    bool done = !is_there || stores_to_release(c, &ch, &key);
    if (done && is_there) {
        commit(&c->s, ch.stores, ch.how_many);
        count(&c->s, COUNT_RELEASES, 1);
    }
    leave_pool(c);
    if (!done)
        Py_RETURN_NONE;
    lease_is_over(lease);
    Py_RETURN_TRUE;
}

/* free(handle) -> True */
OPERATION(core_free)
{
    Change ch = { .how_many = 0 };
    Handle h;
    word record[BODY_WORDS];
    if (n != 1 || !handle_read(c, args[0], &h) || h.start >= c->total || !enter(&c->s))
        Py_RETURN_NONE;
    /* What a stream works on, what is read, and what was freed before is Python's. */
    bool done = record_read(c, h.start, record) && record[R_GENERATION] == h.generation
                && !record[R_LEASES]
                && (record[R_STATE] == STATE_RESERVED
                    || (record[R_STATE] == STATE_PUBLISHED
                        && record[R_READY] == record[R_GENERATION]))
                && !(record[R_STATE] == STATE_RESERVED && record[R_PUBLISHED_NS])
                && stores_to_free(c, &ch, h.start, record);
    if (done)
        commit(&c->s, ch.stores, ch.how_many);
    leave_pool(c);
    if (done)
        Py_RETURN_TRUE;
    Py_RETURN_NONE;
}

/* view(handle, tensors, guard, owner) -> the view of a reservation of this process. Without the
 * lock, for the reasons in `BlockTable.seems_reserved`. */
OPERATION(core_view)
{
    Handle h;
    word record[BODY_WORDS];
    if (n != 4 || !c->s.words || !c->s.me || !handle_read(c, args[0], &h)
        || !find_exact(c, &h, record) || record[R_STATE] != STATE_RESERVED
        || record[R_OWNER] != c->s.me || record[R_READERS_LEFT] || record[R_LEASES])
        Py_RETURN_NONE;
    PyObject *view = view_new(args[1], args[0], args[2], args[3], h.start * c->block_size);
    if (view || PyErr_Occurred())
        return view;
    Py_RETURN_NONE;
}
