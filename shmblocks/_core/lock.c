/* The lock over one segment, as shmblocks/_state/mutex.py has it, and waiting for a word.
 *
 * Python's token (`Mutex.inside`) keeps threads of this process apart there. Here the interpreter's
 * lock does: it is held from `enter` to `leave`, and `enter` refuses while a token is there. So of
 * one process at most one thread is in a section, whichever language it is written in, and flock
 * keeps processes apart as ever.
 */
#include "core.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Attempts at the file lock before Python waits for it. A section takes about 1 us, an attempt 0.3.
 * Fewer: more of the slow way under contention. More: other threads of this process wait longer. */
#define ATTEMPTS 8
/* Of so many sections one is timed, as in shared_segment.py. */
#define TIMED_OF 64
/* Looks at a word between two moments at which the processor is offered to others. */
#define LOOKS 200
/* Looks before the interpreter's lock is given up: it costs more than they do. */
#define FIRST_LOOKS 50

#ifdef SHMBLOCKS_FAULTS
long faults_left, faults_seen;

void fault(void)
{
    faults_seen++;
    if (faults_left && --faults_left == 0) {
        kill(getpid(), SIGKILL);
        for (;;)
            pause();
    }
}
#endif

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("yield" ::: "memory");
#endif
}

word now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (word)t.tv_sec * 1000000000u + (word)t.tv_nsec;
}

void observe(Segment *s, word histogram, word since, word until)
{
    if (until < since)
        return; /* a clock that went back (a restored machine) */
    word *at = s->words + s->counters + histogram, us = (until - since) / 1000;
    word bucket = us ? 64 - (word)__builtin_clzll(us) : 0;
    put(at, get(at) + (until - since));
    at += 1 + (bucket < BUCKETS - 1 ? bucket : BUCKETS - 1);
    put(at, get(at) + 1);
}

static bool lock_file(int fd)
{
    for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
        fault();
        if (!flock(fd, LOCK_EX | LOCK_NB))
            return true;
        if (errno != EWOULDBLOCK)
            return false;
    }
    return false;
}

static void unlock_file(int fd)
{
    fault();
    flock(fd, LOCK_UN);
}

/* Before 3.12 an allocation in a section may run the collector, and that runs finalizers. */
static void stop_collector(Segment *s)
{
#if PY_VERSION_HEX < 0x030C0000
    s->collects = PyGC_Disable();
#else
    (void)s;
#endif
}

static void start_collector(Segment *s)
{
#if PY_VERSION_HEX < 0x030C0000
    if (s->collects)
        PyGC_Enable();
#else
    (void)s;
#endif
}

bool enter(Segment *s)
{
    if (!s->words || !s->me || PyDict_GET_SIZE(s->inside) || !lock_file(s->fd))
        return false;
    if (get(s->words + s->journal)) { /* a dead holder's: Python completes it, and counts it */
        unlock_file(s->fd);
        return false;
    }
    stop_collector(s);
    put(s->words + H_LOCK_HOLDER, s->holder);
    s->timed_since = s->counters && s->sections++ % TIMED_OF == 0 ? now_ns() : 0;
    return true;
}

void leave(Segment *s)
{
    if (s->timed_since)
        observe(s, HISTOGRAM_LOCK_HELD, s->timed_since, now_ns());
    unlock_file(s->fd);
    start_collector(s);
}

void wake_sleeper(word *where)
{
    fault();
    syscall(SYS_futex, (uint32_t *)where, FUTEX_WAKE, 1, NULL, NULL, 0);
}

bool spin_until_different(Segment *s, word a, word b, word ns)
{
    const word *left = s->words + a, *right = s->words + b;
    bool came = get(left) != get(right);
    if (came || !ns)
        return came;
    for (int i = 0; i < FIRST_LOOKS && !(came = get(left) != get(right)); i++)
        relax();
    if (came)
        return true;
    /* The mapping stays while we look at it, whatever other threads do meanwhile. */
    PyObject *mapping = Py_NewRef(s->memory.obj);
    word *const *is_there = &s->words;
    Py_BEGIN_ALLOW_THREADS
    word end = now_ns() + ns;
    do {
        for (int i = 0; i < LOOKS && !(came = get(left) != get(right)); i++)
            relax();
        if (!came)
            sched_yield();
    } while (!came && __atomic_load_n(is_there, __ATOMIC_RELAXED) && now_ns() < end);
    Py_END_ALLOW_THREADS
    Py_DECREF(mapping);
    return came && s->words;
}

/* ---- life ------------------------------------------------------------------------------------ */

int segment_init(Segment *s, PyObject *mapping, PyObject *inside)
{
    s->inside = Py_NewRef(inside);
    s->fd = -1;
    s->sections = 1; /* Python's first section is timed */
    if (PyObject_GetBuffer(mapping, &s->memory, PyBUF_WRITABLE))
        return -1;
    s->words = s->memory.buf;
    return 0;
}

/* Before Python closes the descriptor and the mapping: neither is touched from here on. */
void segment_drop(Segment *s)
{
    segment_forget(s);
    if (s->words) {
        __atomic_store_n(&s->words, NULL, __ATOMIC_RELAXED);
        PyBuffer_Release(&s->memory);
    }
}

void segment_clear(Segment *s)
{
    segment_drop(s);
    Py_CLEAR(s->inside);
}

PyObject *segment_join(Segment *s, PyObject *args)
{
    int fd;
    unsigned long long me, holder;
    if (!PyArg_ParseTuple(args, "iKK", &fd, &me, &holder))
        return NULL;
    if (s->words) {
        s->fd = fd;
        s->holder = holder;
        s->me = me;
    }
    Py_RETURN_NONE;
}

void segment_forget(Segment *s)
{
    s->me = 0;
    s->fd = -1;
}
