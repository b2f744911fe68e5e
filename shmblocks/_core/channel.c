/* Sending and receiving: the transactions of channel_state.py. */
#include "core.h"

static inline word channel_at(const Core *c, word channel)
{
    return c->channels + channel * CHANNEL_WORDS;
}

/* Messages in a channel, and where its slots lie; false: Python's. */
typedef struct {
    word at, capacity, slots, first, head, length;
} Ends;

static bool ends(const Core *c, word channel, Ends *e)
{
    const word *w = c->s.words + channel_at(c, channel);
    e->at = channel_at(c, channel);
    e->capacity = get(w + C_CAPACITY);
    e->slots = e->capacity + SPARE_SLOTS;
    e->first = get(w + C_FIRST_SLOT);
    e->head = get(w + C_HEAD);
    e->length = get(w + C_TAIL) - e->head;
    return e->head <= get(w + C_TAIL) && e->capacity <= c->max_slots && e->slots <= c->max_slots
           && e->first <= c->max_slots - e->slots && e->length <= e->slots;
}

static word message_at(const Core *c, const Ends *e, word number)
{
    return c->messages + (e->first + number % e->slots) * MESSAGE_WORDS;
}

/* Whether somebody slept on a word; counts one off, and wakes. Holding the lock, as in Python. */
static void wake_one(Core *c, word asleep, word changed)
{
    word *count = c->s.words + asleep, sleepers = get(count);
    if (sleepers) {
        put(count, sleepers - 1);
        wake_sleeper(c->s.words + changed);
    }
}

/* ---- send ------------------------------------------------------------------------------------ */

typedef struct {
    Handle h;
    word channel, tokens, readers, length;
    word message[MESSAGE_WORDS];
} Sending;

static bool sending(const Core *c, PyObject *const *args, Sending *s)
{
    s->channel = whole(args[0]) - 1; /* given plus one: `whole` knows no 0 */
    if (s->channel >= c->max_channels || !handle_read(c, args[1], &s->h)
        || !(s->readers = whole(args[3])) || !PyBytes_CheckExact(args[4])
        || PyBytes_GET_SIZE(args[4]) > MOST_MESSAGE_BYTES)
        return false;
    s->tokens = args[2] == Py_None ? s->h.tokens : whole(args[2]);
    s->length = (word)PyBytes_GET_SIZE(args[4]);
    memset(s->message, 0, sizeof s->message);
    s->message[M_START_BLOCK] = s->h.start;
    s->message[M_GENERATION] = s->h.generation;
    s->message[M_LENGTH] = s->length;
    memcpy(s->message + M_DATA, PyBytes_AS_STRING(args[4]), s->length);
    return s->tokens && s->tokens <= s->h.blocks * c->block_size;
}

/* Under the lock. */
static bool send(Core *c, const Sending *s)
{
    Change ch = { .how_many = 0 };
    Ends e;
    word record[BODY_WORDS];
    if (!ends(c, s->channel, &e) || e.length >= e.capacity || !find_exact(c, &s->h, record))
        return false;
    if (can_publish(record)) {
        stores_to_publish(c, &ch, s->h.start, record, s->tokens, s->readers, now_ns(),
                          false);
        count(&c->s, COUNT_PUBLISHES, 1);
    } else if (record[R_STATE] != STATE_PUBLISHED && record[R_STATE] != STATE_LEASED) {
        return false;
    }
    const word *w = c->s.words + e.at;
    word tail = get(w + C_TAIL), next = tail + 1;
    word arrivals = (get(w + C_ARRIVALS) + 1) & 0xFFFFFFFF;
    change(&ch, message_at(c, &e, tail), MESSAGE_WORDS, s->message);
    change(&ch, e.at + C_TAIL, 1, &next);
    change(&ch, e.at + C_ARRIVALS, 1, &arrivals);
    commit(&c->s, ch.stores, ch.how_many);
    wake_one(c, e.at + C_RECEIVERS_ASLEEP, e.at + C_ARRIVALS);
    return true;
}

/* send(channel + 1, handle, num_tokens or None, readers, message) -> the handle that readers open */
OPERATION(core_send)
{
    Sending s;
    if (n != 5 || !sending(c, args, &s))
        Py_RETURN_NONE;
    Handle shorter = s.h;
    shorter.tokens = s.tokens;
    PyObject *handle = s.tokens == s.h.tokens ? Py_NewRef(args[1]) : handle_new(c, &shorter);
    if (!handle)
        return NULL;
    bool done = false;
    if (enter(&c->s)) {
        done = send(c, &s);
        leave_pool(c);
    }
    if (done)
        return handle;
    Py_DECREF(handle);
    Py_RETURN_NONE;
}

/* ---- receive --------------------------------------------------------------------------------- */

/* NOTHING: no message, Python's, or (with an error) no memory. */
typedef enum { NOTHING, TAKEN, PASSED } Received;

/* The blocks of a message were freed meanwhile, or all of its readers have come. */
static bool is_over(const Core *c, word start, word generation, word record[BODY_WORDS])
{
    if (!record_read(c, start, record))
        return record[R_STATE] == STATE_FREE;
    return record[R_GENERATION] != generation || !record[R_READERS_LEFT]
           || (record[R_STATE] != STATE_PUBLISHED && record[R_STATE] != STATE_LEASED);
}

/* Under the lock: take the oldest message and open it; the lease is in `made`. */
static Received receive(Core *c, word channel, const Claimant *claims, PyObject *made, word now)
{
    Change ch = { .how_many = 0 };
    Ends e;
    word record[BODY_WORDS], message[MESSAGE_WORDS];
    if (!ends(c, channel, &e) || !e.length)
        return NOTHING;
    word next = e.head + 1;
    const word *slot = c->s.words + message_at(c, &e, e.head);
    for (int i = 0; i < MESSAGE_WORDS; i++)
        message[i] = get(slot + i);
    Handle h = { message[M_START_BLOCK], 0, 0, message[M_GENERATION], c->pool_id };
    Key key = { 0, h.generation, c->s.me, now };
    if (h.start >= c->total || message[M_LENGTH] > MOST_MESSAGE_BYTES)
        return NOTHING;
    if (is_over(c, h.start, h.generation, record)) {
        change(&ch, e.at + C_HEAD, 1, &next);
        commit(&c->s, ch.stores, ch.how_many);
        wake_one(c, e.at + C_SENDERS_ASLEEP, e.at + C_HEAD);
        return PASSED;
    }
    if (!record_read(c, h.start, record) || !can_open(record)
        || (key.slot = free_lease(c)) == NOWHERE)
        return NOTHING;
    h.blocks = record[R_NUM_BLOCKS];
    h.tokens = record[R_NUM_TOKENS];
    PyObject *handle = handle_new(c, &h);
    const char *data = (const char *)(message + M_DATA);
    PyObject *lease =
        handle ? lease_new(c, claims, handle, &key, data, message[M_LENGTH], made) : NULL;
    Py_XDECREF(handle);
    if (!lease)
        return NOTHING;
    Py_DECREF(lease); /* `made` has it */
    /* By which channel it came, with which message. */
    word came[L_NUMBER - L_CHANNEL + 1] = { channel + 1, message[M_LENGTH] };
    memset((char *)(message + M_DATA) + message[M_LENGTH], 0,
           MOST_MESSAGE_BYTES - message[M_LENGTH]);
    memcpy(came + L_MESSAGE - L_CHANNEL, message + M_DATA, MOST_MESSAGE_BYTES);
    came[L_NUMBER - L_CHANNEL] = e.head;
    stores_to_open(c, &ch, h.start, record, key.slot, now);
    change(&ch, e.at + C_HEAD, 1, &next);
    change(&ch, c->leases + key.slot * LEASE_WORDS + L_CHANNEL, L_NUMBER - L_CHANNEL + 1, came);
    commit(&c->s, ch.stores, ch.how_many);
    count(&c->s, COUNT_OPENS, 1);
    observe(&c->s, HISTOGRAM_PUBLISH_TO_OPEN, record[R_PUBLISHED_NS], now);
    wake_one(c, e.at + C_SENDERS_ASLEEP, e.at + C_HEAD);
    return TAKEN;
}

/* receive(channel + 1, limit, means, owner, made, spin) -> how many leases are in the list `made`
 * now, up to `limit`; 0: Python is to look. Spins for `spin` ns while there is no message. */
OPERATION(core_receive)
{
    Claimant claims;
    word channel, limit, had = 0;
    if (n != 6 || (channel = whole(args[0]) - 1) >= c->max_channels || !(limit = whole(args[1]))
        || !claimant(&claims, args[2], args[3]) || !PyList_CheckExact(args[4]) || !c->s.words
        || !c->s.me)
        return PyLong_FromLong(0);
    word at = channel_at(c, channel);
    if (!spin_until_different(&c->s, at + C_HEAD, at + C_TAIL, whole(args[5])) || !enter(&c->s))
        return PyLong_FromLong(0);
    word now = now_ns();
    Received last = PASSED;
    while (had < limit && last != NOTHING) {
        last = receive(c, channel, &claims, args[4], now);
        had += last == TAKEN;
    }
    leave_pool(c);
    /* What was taken is the caller's, also when there was no memory for more. */
    if (had)
        PyErr_Clear();
    else if (PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLongLong(had);
}
