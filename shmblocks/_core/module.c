/* The module: one `PoolCore` for each pool of this process, one `QueueCore` for each queue. */
#include "core.h"

#ifdef SHMBLOCKS_FAULTS
extern long faults_left, faults_seen;

/* die_at(n): die at the n-th store or call of the kernel from now on (0: never); how many there
 * were since the last call. */
static PyObject *module_die_at(PyObject *Py_UNUSED(module), PyObject *arg)
{
    long seen = faults_seen;
    faults_left = PyLong_AsLong(arg);
    faults_seen = 0;
    return PyErr_Occurred() ? NULL : PyLong_FromLong(seen);
}
#endif

/* Core(mapping, inside, hints, numbers): `numbers` in the order of `into` */
static int core_init(PyObject *self, PyObject *args, PyObject *Py_UNUSED(kwds))
{
    Core *c = (Core *)self;
    PyObject *mapping, *inside, *hints, *numbers;
    if (c->s.words
        || !PyArg_ParseTuple(args, "OO!OO!", &mapping, &PyDict_Type, &inside, &hints,
                             &PyTuple_Type, &numbers))
        return -1;
    word bitmap_words = 0;
    word *into[] = { &c->pool_id, &c->total, &c->block_size, &c->max_leases, &c->unclaimed_ns,
                     &c->first_fit, &c->max_channels, &c->max_slots, &c->s.journal,
                     &c->s.counters, &c->records, &c->bitmap, &bitmap_words, &c->leases, &c->live,
                     &c->channels, &c->messages, &c->buckets };
    if (PyTuple_GET_SIZE(numbers) != sizeof into / sizeof *into) {
        PyErr_SetNone(PyExc_NotImplementedError); /* of another version than this Python */
        return -1;
    }
    for (size_t i = 0; i < sizeof into / sizeof *into; i++) {
        *into[i] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(numbers, (Py_ssize_t)i));
        if (*into[i] == ~(word)0 && PyErr_Occurred())
            return -1;
    }
    if (PyObject_GetBuffer(hints, &c->hints, PyBUF_WRITABLE))
        return -1;
    c->bits = PyMem_Calloc(bitmap_words, WORD);
    if (!c->bits) {
        PyErr_NoMemory();
        return -1;
    }
    return segment_init(&c->s, mapping, inside);
}

static PyObject *core_join(Core *c, PyObject *args)
{
    return segment_join(&c->s, args);
}

static PyObject *core_forget(Core *c, PyObject *Py_UNUSED(ignored))
{
    segment_forget(&c->s);
    Py_RETURN_NONE;
}

static PyObject *core_drop(Core *c, PyObject *Py_UNUSED(ignored))
{
    segment_drop(&c->s);
    Py_RETURN_NONE;
}

static PyObject *core_has_joined(Core *c, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(c->s.me != 0);
}

static void core_dealloc(Core *c)
{
    segment_clear(&c->s);
    if (c->hints.buf)
        PyBuffer_Release(&c->hints);
    PyMem_Free(c->bits);
    Py_XDECREF(c->dropped);
    Py_TYPE(c)->tp_free((PyObject *)c);
}

#define FAST(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL, NULL

static PyMethodDef core_methods[] = {
    { "reserve", FAST(core_reserve) },
    { "publish", FAST(core_publish) },
    { "open", FAST(core_open) },
    { "lease", FAST(core_lease) },
    { "free", FAST(core_free) },
    { "view", FAST(core_view) },
    { "send", FAST(core_send) },
    { "receive", FAST(core_receive) },
    { "find", FAST(core_find) },
    { "get", FAST(core_get) },
    { "best_window", FAST(core_best_window) },
    { "release", (PyCFunction)core_release, METH_O, NULL },
    { "join", (PyCFunction)core_join, METH_VARARGS, NULL },
    { "forget", (PyCFunction)core_forget, METH_NOARGS, NULL },
    { "drop", (PyCFunction)core_drop, METH_NOARGS, NULL },
    { NULL, NULL, 0, NULL },
};

static PyGetSetDef core_properties[] = {
    { "has_joined", (getter)core_has_joined, NULL, NULL, NULL },
    { NULL, NULL, NULL, NULL, NULL },
};

static PyTypeObject CoreType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "shmblocks._core._native.PoolCore",
    .tp_basicsize = sizeof(Core),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = core_init,
    .tp_dealloc = (destructor)core_dealloc,
    .tp_methods = core_methods,
    .tp_getset = core_properties,
};

static PyMethodDef module_methods[] = {
    { "know", module_know, METH_VARARGS, NULL },
#ifdef SHMBLOCKS_FAULTS
    { "die_at", module_die_at, METH_O, NULL },
#endif
    { NULL, NULL, 0, NULL },
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "shmblocks._core._native",
    .m_size = -1,
    .m_methods = module_methods,
};

#ifdef SHMBLOCKS_FAULTS
#define INIT PyInit__faults
#else
#define INIT PyInit__native
#endif

PyMODINIT_FUNC INIT(void)
{
    if (PyType_Ready(&CoreType) || PyType_Ready(&QueueCoreType) || PyType_Ready(&TensorType))
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (!module || PyModule_AddIntConstant(module, "LAYOUT_VERSION", LAYOUT_VERSION)
        || PyModule_AddObject(module, "PoolCore", Py_NewRef((PyObject *)&CoreType))
        || PyModule_AddObject(module, "QueueCore", Py_NewRef((PyObject *)&QueueCoreType))
        || PyModule_AddObject(module, "Tensors", Py_NewRef((PyObject *)&TensorType))) {
        Py_XDECREF(module);
        return NULL;
    }
    return module;
}
