/* A queue's `put` and `get`: the transactions of queue_state.py, each with one store that commits. */
#include "core.h"

typedef struct {
    PyObject_HEAD
    Segment s;
    word capacity, message_bytes, slots, slot_bytes; /* `slots`, in bytes */
} QueueCore;

static word *slot_at(const QueueCore *r, word number)
{
    return r->s.words + (r->slots + number % r->capacity * r->slot_bytes) / WORD;
}

/* Whether somebody sleeps on a word; counts one off, who is to be woken. */
static bool take_sleeper(QueueCore *r, word asleep)
{
    word *count = r->s.words + asleep, sleepers = get(count);
    if (sleepers)
        put(count, sleepers - 1);
    return sleepers;
}

/* put(message) -> True, None: Python's (also when it is full) */
static PyObject *queue_put(QueueCore *r, PyObject *message)
{
    if (!PyBytes_CheckExact(message) || (word)PyBytes_GET_SIZE(message) > r->message_bytes
        || !enter(&r->s))
        Py_RETURN_NONE;
    word *w = r->s.words, tail = get(w + Q_TAIL), head = get(w + Q_HEAD);
    bool sleeper = false, has_room = head <= tail && tail - head < r->capacity && tail + 1;
    if (has_room) {
        word *slot = slot_at(r, tail);
        put(slot, (word)PyBytes_GET_SIZE(message));
        fault();
        memcpy(slot + 1, PyBytes_AS_STRING(message), (size_t)PyBytes_GET_SIZE(message));
        __asm__ volatile("" ::: "memory");
        put(w + Q_TAIL, tail + 1); /* this one commits */
        sleeper = take_sleeper(r, Q_GETTERS_ASLEEP);
    }
    leave(&r->s);
    if (!has_room)
        Py_RETURN_NONE;
    if (sleeper)
        wake_sleeper(w + Q_TAIL);
    Py_RETURN_TRUE;
}

/* get(spin) -> a message, None: Python is to look. Spins for `spin` ns while there is none. */
static PyObject *queue_get(QueueCore *r, PyObject *spin)
{
    if (!r->s.words || !spin_until_different(&r->s, Q_HEAD, Q_TAIL, whole(spin)) || !enter(&r->s))
        Py_RETURN_NONE;
    word *w = r->s.words, head = get(w + Q_HEAD), tail = get(w + Q_TAIL);
    const word *slot = slot_at(r, head);
    word length = get(slot);
    PyObject *message = NULL;
    bool sleeper = false;
    if (head < tail && tail - head <= r->capacity && length <= r->message_bytes)
        message = PyBytes_FromStringAndSize((const char *)(slot + 1), (Py_ssize_t)length);
    if (message) {
        put(w + Q_HEAD, head + 1); /* this one commits */
        sleeper = take_sleeper(r, Q_PUTTERS_ASLEEP);
    }
    leave(&r->s);
    if (sleeper)
        wake_sleeper(w + Q_HEAD);
    if (message || PyErr_Occurred())
        return message;
    Py_RETURN_NONE;
}

/* ---- life ------------------------------------------------------------------------------------ */

static int queue_init(PyObject *self, PyObject *args, PyObject *Py_UNUSED(kwds))
{
    QueueCore *r = (QueueCore *)self;
    PyObject *mapping, *inside;
    unsigned long long numbers[5];
    if (r->s.words
        || !PyArg_ParseTuple(args, "OO!(KKKKK)", &mapping, &PyDict_Type, &inside, numbers,
                             numbers + 1, numbers + 2, numbers + 3, numbers + 4)
        || segment_init(&r->s, mapping, inside))
        return -1;
    r->s.journal = numbers[0];
    r->capacity = numbers[1];
    r->message_bytes = numbers[2];
    r->slots = numbers[3];
    r->slot_bytes = numbers[4];
    return 0;
}

static PyObject *queue_join(QueueCore *r, PyObject *args)
{
    return segment_join(&r->s, args);
}

static PyObject *queue_forget(QueueCore *r, PyObject *Py_UNUSED(ignored))
{
    segment_forget(&r->s);
    Py_RETURN_NONE;
}

static PyObject *queue_drop(QueueCore *r, PyObject *Py_UNUSED(ignored))
{
    segment_drop(&r->s);
    Py_RETURN_NONE;
}

static PyObject *queue_has_joined(QueueCore *r, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(r->s.me != 0);
}

static void queue_dealloc(QueueCore *r)
{
    segment_clear(&r->s);
    Py_TYPE(r)->tp_free((PyObject *)r);
}

static PyMethodDef methods[] = {
    { "put", (PyCFunction)queue_put, METH_O, NULL },
    { "get", (PyCFunction)queue_get, METH_O, NULL },
    { "join", (PyCFunction)queue_join, METH_VARARGS, NULL },
    { "forget", (PyCFunction)queue_forget, METH_NOARGS, NULL },
    { "drop", (PyCFunction)queue_drop, METH_NOARGS, NULL },
    { NULL, NULL, 0, NULL },
};

static PyGetSetDef properties[] = {
    { "has_joined", (getter)queue_has_joined, NULL, NULL, NULL },
    { NULL, NULL, NULL, NULL, NULL },
};

PyTypeObject QueueCoreType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "shmblocks._core._native.QueueCore",
    .tp_basicsize = sizeof(QueueCore),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = queue_init,
    .tp_dealloc = (destructor)queue_dealloc,
    .tp_methods = methods,
    .tp_getset = properties,
};
