/* Which entries go when an allocation finds no room: `best_window` of eviction.py.
 *
 * It only reads, and its caller is in a section of Python's: nothing is entered or stored here.
 */
#include "core.h"

/* Consecutive blocks that are free (`used` is -1), or of one evictable entry last used then. */
typedef struct {
    word start, blocks;
    int64_t used;
} Item;

typedef struct {
    const Core *c;
    word now, wanted;
    Item *items;  /* of all runs that were walked, one behind the other */
    word *youngest; /* scratch of `slide` */
    word count, room;
    word first, last; /* the best window's items */
    int64_t age;      /* of its youngest victim */
    bool found;
} Search;

static bool is_evictable(const Search *s, const word *record)
{
    return get(record + R_STATE) == STATE_PUBLISHED && get(record + R_KEYED)
           && get(record + R_READERS_LEFT) >= UNBOUNDED && !get(record + R_LEASES)
           && get(record + R_READY) == get(record + R_GENERATION)
           && get(record + R_HOLD) <= s->now;
}

/* As `_slide`, over the run of items that starts at `from`. */
static void slide(Search *s, word from)
{
    const Item *items = s->items;
    /* The items of a window that no later one of it is younger than; the first is its youngest. */
    word *youngest = s->youngest, head = 0, tail = 0, first = from, blocks = 0;
    for (word last = from; last < s->count; last++) {
        blocks += items[last].blocks;
        while (tail > head && items[youngest[tail - 1]].used <= items[last].used)
            tail--;
        youngest[tail++] = last;
        if (blocks < s->wanted)
            continue;
        while (blocks - items[first].blocks >= s->wanted) {
            blocks -= items[first].blocks;
            if (youngest[head] == first)
                head++;
            first++;
        }
        int64_t age = items[youngest[head]].used;
        if (!s->found || age < s->age) {
            s->found = true;
            s->age = age;
            s->first = first;
            s->last = last;
        }
    }
}

/* As `_Walk.runs` and `_best` over what it finds: from block `begin` to `end`, over at most `most`
 * allocations, which it counts. False: Python's, the records and the bitmap disagree. */
static bool walk(Search *s, word begin, word end, word most, word *seen)
{
    const Core *c = s->c;
    word from = s->count, position = begin;
    for (*seen = 0; position < end && *seen < most;) {
        const word *record = record_at(c, position);
        Item item = { position, 0, -1 };
        bool is_in = true;
        if (!get(record + R_STATE)) {
            item.blocks = next_block(c, position, end, 0) - position;
        } else {
            ++*seen;
            item.blocks = get(record + R_NUM_BLOCKS);
            item.used = (int64_t)get(record + R_USED);
            is_in = is_evictable(s, record);
        }
        if (!item.blocks || item.blocks > c->total - position)
            return false;
        if (!is_in) {
            slide(s, from);
            from = s->count;
        } else if (s->count < s->room) {
            s->items[s->count++] = item;
        } else {
            return false;
        }
        position += item.blocks;
    }
    slide(s, from);
    return true;
}

static bool search_windows(Search *s, word most)
{
    const word *w = s->c->s.words;
    word total = s->c->total, cursor = get(w + H_CURSOR), seen;
    if (cursor >= total)
        return false;
    for (; most < get(w + H_LIVE); most *= 8) {
        s->count = 0;
        /* A run does not go on behind the end of the pool. */
        if (!walk(s, cursor, total, most, &seen) || !walk(s, 0, cursor, most - seen, &seen))
            return false;
        if (s->found)
            return true;
    }
    s->count = 0;
    return walk(s, 0, total, total, &seen);
}

static PyObject *window_new(const Search *s)
{
    PyObject *victims = PyList_New(0);
    for (word i = s->first; victims && i <= s->last; i++) {
        if (s->items[i].used < 0)
            continue;
        PyObject *start = PyLong_FromUnsignedLongLong(s->items[i].start);
        if (!start || PyList_Append(victims, start))
            Py_CLEAR(victims);
        Py_XDECREF(start);
    }
    return victims ? Py_BuildValue("KN", (unsigned long long)s->items[s->first].start, victims) : NULL;
}

/* best_window(num_blocks, most_items, now_ns) -> (start, starts of the victims), False: there is
 * none, None: Python's. */
OPERATION(core_best_window)
{
    Search s = { .c = c };
    word most;
    if (n != 3 || !c->s.words || !(s.wanted = whole(args[0])) || !(most = whole(args[1]))
        || !(s.now = moment(args[2])))
        Py_RETURN_NONE;
    /* Each allocation is an item at most, and between two of them is at most one of free blocks. */
    s.room = 2 * (get(c->s.words + H_LIVE) + 2);
    if (s.room > 2 * (c->total + 2))
        Py_RETURN_NONE;
    s.items = PyMem_Malloc(s.room * (sizeof *s.items + sizeof *s.youngest));
    if (!s.items)
        return PyErr_NoMemory();
    s.youngest = (word *)(s.items + s.room);
    PyObject *window = Py_None;
    if (search_windows(&s, most))
        window = s.found ? window_new(&s) : Py_False;
    if (window == Py_None || window == Py_False)
        Py_INCREF(window);
    PyMem_Free(s.items);
    return window;
}
