/* What the files of the compiled core share: words, the lock, stores, objects.
 *
 * Contract, of every operation in this folder
 * - The bytes that it leaves behind are those of shmblocks/_state, bit for bit and store for store,
 *   and the lock is theirs: processes with and without this core work on one pool.
 * - Whatever is out of the ordinary (somebody waits for blocks, no room, a stale handle, a journal
 *   that a dead process left, a stream, a number that leads outside of the pool) returns to Python
 *   *before the first store*, and Python does it. So there is not one error text in C.
 * - A section under the lock runs with the interpreter's lock held and calls nothing that runs
 *   Python code: no signal handler, thread, fork or collector comes in between. Every object that
 *   an operation returns is made before its commit.
 * - Each store into shared memory goes through `put`, each call of the kernel through `fault` first:
 *   the places at which a process may die. Compiled with SHMBLOCKS_FAULTS it dies at the n-th.
 */
#ifndef SHMBLOCKS_CORE_H
#define SHMBLOCKS_CORE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "layout.h"

#ifdef Py_GIL_DISABLED
#error "the core relies on the interpreter's lock; free-threaded builds use the Python"
#endif

typedef uint64_t word;

/* ---- words of shared memory ------------------------------------------------------------------ */

#ifdef SHMBLOCKS_FAULTS
void fault(void);
#else
#define fault() ((void)0)
#endif

/* In program order for whoever comes after our death: the compiler may not move it, and the kernel's
 * release of a dead process's lock comes after all of its stores. */
static inline void put(word *where, word value)
{
    fault();
    __atomic_store_n(where, value, __ATOMIC_RELAXED);
    __asm__ volatile("" ::: "memory");
}

static inline word get(const word *where)
{
    return __atomic_load_n(where, __ATOMIC_RELAXED);
}

/* The monotonic clock, ns. */
word now_ns(void);

/* ---- a segment, and its lock (lock.c) -------------------------------------------------------- */

typedef struct {
    Py_buffer memory;
    word *words; /* NULL: dropped */
    int fd;      /* of the description that holds the locks */
    word me;     /* our participant word; 0: Python has not handed over, or took back */
    word holder; /* what the lock's holder is noted as */
    PyObject *inside; /* Mutex.inside: not empty while a thread of ours is in a section of Python's */
    word journal;     /* index of the journal's first word */
    word counters;    /* index of the first counter; 0: a segment without */
    word sections;
    word timed_since; /* ns; 0: the section is not timed */
    bool collects;    /* whether the collector was on before the section */
} Segment;

/* In, on a state that is whole; false: Python's. */
bool enter(Segment *s);
void leave(Segment *s);
/* Wake one of those who sleep on a word. */
void wake_sleeper(word *where);
/* Spins up to `ns` until *a != *b, without the interpreter's lock; whether that came. */
bool spin_until_different(Segment *s, word a, word b, word ns);

int segment_init(Segment *s, PyObject *mapping, PyObject *inside);
void segment_drop(Segment *s);
void segment_clear(Segment *s);
/* join(fd, me, holder): Python hands over. */
PyObject *segment_join(Segment *s, PyObject *args);
/* Python takes back, until it joins again. */
void segment_forget(Segment *s);

static inline void count(Segment *s, word counter, word more)
{
    word *at = s->words + s->counters + counter;
    put(at, get(at) + more);
}
void observe(Segment *s, word histogram, word since, word until);

/* ---- the journal (journal.c) ----------------------------------------------------------------- */

typedef struct {
    word at;          /* index of its first word */
    word count;       /* words */
    const word *data;
} Store;

/* As Journal.commit: all stores, or (killed before) none. */
void commit(Segment *s, const Store *stores, int how_many);

/* ---- a pool ---------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    Segment s;
    Py_buffer hints; /* process-local words that BlockTable has too: where a lease may be free */
    PyObject *dropped; /* what is to be let go of behind the lock: that may run Python code */
    word pool_id, total, block_size, max_leases, unclaimed_ns, first_fit, max_channels, max_slots;
    word records, bitmap, leases, live, channels, messages, buckets; /* indices of words */
    word *bits; /* scratch, as long as the bitmap */
} Core;

typedef struct {
    word start, blocks, tokens, generation, pool_id;
} Handle;

typedef struct {
    word slot, generation, holder, opened;
} Key;

static inline word *next_lease(Core *c)
{
    return c->hints.buf;
}

static inline word *record_at(const Core *c, word block)
{
    return c->s.words + c->records + block * RECORD_WORDS;
}

static inline word *lease_at(const Core *c, word slot)
{
    return c->s.words + c->leases + slot * LEASE_WORDS;
}

/* As `leave`, and what was dropped under the lock goes. */
static inline void leave_pool(Core *c)
{
    leave(&c->s);
    Py_CLEAR(c->dropped);
}

/* blocks.c: as the methods of BlockTable, for what is in order; false: Python's. */

#define BODY_WORDS (R_KEYED + 1)
#define NOWHERE (~(word)0)
/* More than any operation makes. */
#define MOST_STORES 12

/* What an operation is going to commit, and the words that the stores point to. */
typedef struct {
    Store stores[MOST_STORES];
    int how_many;
    word record[RECORD_WORDS], head[HEAD_WORDS], lease[LEASE_HEAD_WORDS];
    word until, moved, live_index;
} Change;

static inline void change(Change *ch, word at, word how_many, const word *data)
{
    ch->stores[ch->how_many++] = (Store){ at, how_many, data };
}

bool record_read(const Core *c, word block, word record[BODY_WORDS]);
bool find_exact(const Core *c, const Handle *h, word record[BODY_WORDS]);
word next_block(const Core *c, word from, word end, word flip);
word search(const Core *c, word from, word blocks);
Store marked(Core *c, word start, word blocks, bool used);
bool can_publish(const word record[BODY_WORDS]);
/* `on_stream`: a stream will say when it is ready. */
void stores_to_publish(Core *c, Change *ch, word start, const word record[BODY_WORDS], word tokens,
                       word readers, word now, bool on_stream);
bool can_lease(const word record[BODY_WORDS]);
bool can_open(const word record[BODY_WORDS]);
word free_lease(Core *c);
void stores_to_open(Core *c, Change *ch, word start, const word record[BODY_WORDS], word slot, word now);
bool stores_to_free(Core *c, Change *ch, word start, const word record[BODY_WORDS]);
bool stores_to_release(Core *c, Change *ch, const Key *key);

/* objects.c: the objects of Python that an operation takes and gives. */

bool handle_read(const Core *c, PyObject *object, Handle *h);
PyObject *handle_new(const Core *c, const Handle *h);
/* A number of tokens, blocks or readers of at least 1; 0: it is none, or too large for one. */
word whole(PyObject *object);
/* A moment of the monotonic clock, ns; 0: it is none. */
word moment(PyObject *object);

/* What a lease needs: `LeaseMeans`, and the pool that it keeps alive. */
typedef struct {
    PyObject *means, *owner;
} Claimant;

bool claimant(Claimant *claims, PyObject *means, PyObject *owner);
/* Under the lock: a new lease, in the list `made` too; NULL with an error: no memory. */
PyObject *lease_new(Core *c, const Claimant *claims, PyObject *handle, const Key *key,
                    const char *message, word length, PyObject *made);
/* 1: the lease's key, 0: it has ended, -1: Python's. */
int lease_key(PyObject *lease, Key *key);
void lease_is_over(PyObject *lease);
PyObject *view_new(PyObject *tensors, PyObject *handle, PyObject *guard, PyObject *owner, word token);
PyObject *module_know(PyObject *module, PyObject *args);

/* Operations, as methods of Core: pool.c, channel.c, cache.c, eviction.c. */
#define OPERATION(name) PyObject *name(Core *c, PyObject *const *args, Py_ssize_t n)
OPERATION(core_reserve);
OPERATION(core_publish);
OPERATION(core_open);
OPERATION(core_lease);
OPERATION(core_free);
OPERATION(core_view);
OPERATION(core_send);
OPERATION(core_receive);
OPERATION(core_find);
OPERATION(core_get);
OPERATION(core_best_window);
PyObject *core_release(Core *c, PyObject *lease);

extern PyTypeObject QueueCoreType;   /* queue.c: a queue's put and get */
extern PyTypeObject TensorType; /* tensors.c: fields as tensors */

#endif
