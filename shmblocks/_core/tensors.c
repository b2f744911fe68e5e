/* The rows of a field as a tensor, by DLPack: in half of the time that a slice takes.
 *
 * As with `HostMemory.maker` each tensor has a storage of its own, of exactly its rows, and keeps
 * the mapping alive. DLPack: https://dmlc.github.io/dlpack/latest/c_api.html (unversioned structs).
 */
#include "core.h"

#define MOST_DIMENSIONS 8
#define CPU 1

typedef struct {
    PyObject_HEAD
    Py_buffer memory;
    PyObject *from_dlpack, *otherwise;
    word start, token_bytes; /* bytes */
    int dimensions;          /* of the rows: tokens, then the shape of one */
    int64_t shape[MOST_DIMENSIONS];
    bool transposed;
    uint8_t code, bits;
} Tensors;

typedef struct {
    void *data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;

typedef struct Managed {
    DLTensor tensor;
    void *context;
    void (*deleter)(struct Managed *);
} Managed;

typedef struct {
    Managed managed;
    Tensors *owner;
    int64_t shape[MOST_DIMENSIONS], strides[MOST_DIMENSIONS];
} Exported;

/* Torch calls it from whatever thread lets go of the storage. */
static void exported_free(Managed *managed)
{
    Exported *exported = managed->context;
    if (Py_IsInitialized()) {
        PyGILState_STATE state = PyGILState_Ensure();
        Py_DECREF((PyObject *)exported->owner);
        PyGILState_Release(state);
    }
    free(exported);
}

static void capsule_free(PyObject *capsule)
{
    if (PyCapsule_IsValid(capsule, "dltensor")) { /* otherwise it is torch's now */
        Managed *managed = PyCapsule_GetPointer(capsule, "dltensor");
        managed->deleter(managed);
    }
}

static PyObject *capsule_of(Tensors *t, word first, word tokens)
{
    Exported *exported = malloc(sizeof *exported);
    if (!exported)
        return PyErr_NoMemory();
    int64_t stride = 1;
    memcpy(exported->shape, t->shape, sizeof exported->shape);
    exported->shape[0] = (int64_t)tokens;
    for (int i = t->dimensions - 1; i >= 0; stride *= exported->shape[i--])
        exported->strides[i] = stride;
    if (t->transposed) { /* stored as [tokens, k], given as [k, tokens] */
        exported->shape[0] = exported->shape[1];
        exported->shape[1] = (int64_t)tokens;
        exported->strides[1] = exported->strides[0];
        exported->strides[0] = 1;
    }
    exported->owner = (Tensors *)Py_NewRef((PyObject *)t);
    exported->managed = (Managed){
        .tensor = { .data = (char *)t->memory.buf + t->start + first * t->token_bytes,
                    .device_type = CPU, .ndim = t->dimensions, .code = t->code, .bits = t->bits,
                    .lanes = 1, .shape = exported->shape, .strides = exported->strides },
        .context = exported,
        .deleter = exported_free,
    };
    PyObject *capsule = PyCapsule_New(exported, "dltensor", capsule_free);
    if (!capsule)
        exported_free(&exported->managed);
    return capsule;
}

/* make(first, tokens) -> the tensor of these rows */
static PyObject *tensors_make(Tensors *t, PyObject *const *args, Py_ssize_t n)
{
    word first = n == 2 && PyLong_CheckExact(args[0]) ? PyLong_AsUnsignedLongLong(args[0]) : 0;
    word tokens = n == 2 ? whole(args[1]) : 0;
    PyErr_Clear(); /* (a first one that is negative or too large is refused below) */
    word there = ((word)t->memory.len - t->start) / t->token_bytes;
    if (!tokens || tokens > there || first > there - tokens)
        return PyObject_Vectorcall(t->otherwise, args, (size_t)n, NULL);
    PyObject *capsule = capsule_of(t, first, tokens);
    if (!capsule)
        return NULL;
    PyObject *tensor = PyObject_CallOneArg(t->from_dlpack, capsule);
    Py_DECREF(capsule);
    return tensor;
}

/* Tensors(memory, (start, token_bytes, code, bits, transposed), shape, from_dlpack, otherwise):
 * `otherwise` makes what this cannot */
static int tensors_init(PyObject *self, PyObject *args, PyObject *Py_UNUSED(kwds))
{
    Tensors *t = (Tensors *)self;
    PyObject *memory, *shape, *from_dlpack, *otherwise;
    unsigned long long start, token_bytes;
    int transposed;
    if (t->memory.buf
        || !PyArg_ParseTuple(args, "O(KKbbp)O!OO", &memory, &start, &token_bytes, &t->code,
                             &t->bits, &transposed, &PyTuple_Type, &shape, &from_dlpack,
                             &otherwise))
        return -1;
    if (PyTuple_GET_SIZE(shape) >= MOST_DIMENSIONS || !token_bytes
        || (transposed && PyTuple_GET_SIZE(shape) != 1)) {
        PyErr_SetNone(PyExc_NotImplementedError); /* the caller makes them otherwise */
        return -1;
    }
    t->dimensions = 1 + (int)PyTuple_GET_SIZE(shape);
    for (int i = 1; i < t->dimensions; i++) {
        t->shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i - 1));
        if (t->shape[i] == -1 && PyErr_Occurred())
            return -1;
    }
    t->start = start;
    t->token_bytes = token_bytes;
    t->transposed = transposed;
    if (PyObject_GetBuffer(memory, &t->memory, PyBUF_SIMPLE))
        return -1;
    if (start > (word)t->memory.len) {
        PyErr_SetNone(PyExc_NotImplementedError);
        return -1;
    }
    t->from_dlpack = Py_NewRef(from_dlpack);
    t->otherwise = Py_NewRef(otherwise);
    return 0;
}

static void tensors_dealloc(Tensors *t)
{
    if (t->memory.buf)
        PyBuffer_Release(&t->memory);
    Py_XDECREF(t->from_dlpack);
    Py_XDECREF(t->otherwise);
    Py_TYPE(t)->tp_free((PyObject *)t);
}

static PyMethodDef methods[] = {
    { "make", (PyCFunction)(void (*)(void))tensors_make, METH_FASTCALL, NULL },
    { NULL, NULL, 0, NULL },
};

PyTypeObject TensorType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "shmblocks._core._native.Tensors",
    .tp_basicsize = sizeof(Tensors),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = tensors_init,
    .tp_dealloc = (destructor)tensors_dealloc,
    .tp_methods = methods,
};
