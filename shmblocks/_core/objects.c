/* The objects of Python that operations take and give: handles, leases, views.
 *
 * They are those that Python makes, of the same classes; here their slots are read and filled by
 * the offsets that their descriptors name, without a frame of Python's.
 */
#include "core.h"

#include <structmember.h>

enum { START, BLOCKS, TOKENS, GENERATION, POOL_ID };
enum { KEY_SLOT, KEY_GENERATION, KEY_HOLDER, KEY_OPENED };
enum { LEASE_HANDLE, LEASE_MESSAGE, LEASE_STATE, LEASE_STREAMS, LEASE_TENSORS, LEASE_OWNER,
       LEASE_ORDER, LEASE_GUARD, LEASE_KEY };
enum { GUARD_STATE, GUARD_IS_OPEN, GUARD_IS_READY };
enum { VIEW_TENSORS, VIEW_HANDLE, VIEW_GUARD, VIEW_OWNER, VIEW_START_TOKEN };
#define MOST_SLOTS 9

typedef struct {
    const char *name;
    const char *slots[MOST_SLOTS];
    PyTypeObject *type;
    Py_ssize_t offsets[MOST_SLOTS];
} Class;

static Class handles = { "handle", { "start_block", "num_blocks", "num_tokens", "generation", "pool_id" }, NULL, { 0 } };
static Class keys = { "key", { "slot", "generation", "holder", "opened_ns" }, NULL, { 0 } };
static Class leases = { "lease", { "handle", "message", "_state", "_streams", "_tensors", "_owner", "_order", "_guard", "_key" }, NULL, { 0 } };
static Class guards = { "guard", { "_state", "is_open", "is_ready" }, NULL, { 0 } };
static Class views = { "view", { "_tensors", "handle", "_guard", "_owner", "start_token" }, NULL, { 0 } };
static Class *const classes[] = { &handles, &keys, &leases, &guards, &views };
static PyObject *no_message;

/* know(what, class): where the slots of a class lie; False: not where C can reach them. */
PyObject *module_know(PyObject *Py_UNUSED(module), PyObject *args)
{
    const char *what;
    PyTypeObject *type;
    if (!PyArg_ParseTuple(args, "sO!", &what, &PyType_Type, &type))
        return NULL;
    if (!no_message && !(no_message = PyBytes_FromStringAndSize(NULL, 0)))
        return NULL;
    for (size_t k = 0; k < sizeof classes / sizeof *classes; k++) {
        Class *known = classes[k];
        if (strcmp(known->name, what))
            continue;
        Py_ssize_t offsets[MOST_SLOTS] = { 0 };
        for (int i = 0; i < MOST_SLOTS && known->slots[i]; i++) {
            PyObject *slot = PyDict_GetItemString(type->tp_dict, known->slots[i]);
            if (!slot || Py_TYPE(slot) != &PyMemberDescr_Type
                || ((PyMemberDescrObject *)slot)->d_member->type != T_OBJECT_EX)
                Py_RETURN_FALSE;
            offsets[i] = ((PyMemberDescrObject *)slot)->d_member->offset;
        }
        memcpy(known->offsets, offsets, sizeof offsets);
        Py_XSETREF(known->type, (PyTypeObject *)Py_NewRef(type));
        Py_RETURN_TRUE;
    }
    Py_RETURN_FALSE;
}

static inline PyObject **slot_of(PyObject *object, const Class *its, int which)
{
    return (PyObject **)((char *)object + its->offsets[which]);
}

/* Whole numbers from the first slots of an object; false: something else is there. */
static bool numbers(PyObject *object, const Class *its, int how_many, word *out)
{
    for (int i = 0; i < how_many; i++) {
        PyObject *value = *slot_of(object, its, i);
        if (!value || !PyLong_Check(value))
            return false;
        out[i] = PyLong_AsUnsignedLongLong(value);
        if (out[i] == ~(word)0 && PyErr_Occurred()) {
            PyErr_Clear();
            return false;
        }
    }
    return true;
}

/* A new object with these whole numbers, as its class makes it. */
static PyObject *made_of(const Class *its, int how_many, const word *in)
{
    PyObject *args[MOST_SLOTS] = { NULL }, *made = NULL;
    int done = 0;
    while (done < how_many && (args[done] = PyLong_FromUnsignedLongLong(in[done])))
        done++;
    if (done == how_many)
        made = PyObject_Vectorcall((PyObject *)its->type, args, (size_t)how_many, NULL);
    while (done)
        Py_DECREF(args[--done]);
    return made;
}

word moment(PyObject *object)
{
    if (!PyLong_CheckExact(object))
        return 0;
    word value = PyLong_AsUnsignedLongLong(object);
    if (value == ~(word)0 && PyErr_Occurred()) {
        PyErr_Clear();
        return 0;
    }
    return value;
}

word whole(PyObject *object)
{
    word value = moment(object);
    return value <= UNBOUNDED ? value : 0;
}

/* ---- handles --------------------------------------------------------------------------------- */

/* A handle of real blocks of this pool. */
bool handle_read(const Core *c, PyObject *object, Handle *h)
{
    word in[5];
    if (Py_TYPE(object) != handles.type || !numbers(object, &handles, 5, in))
        return false;
    *h = (Handle){ in[START], in[BLOCKS], in[TOKENS], in[GENERATION], in[POOL_ID] };
    return h->pool_id == c->pool_id && h->generation;
}

PyObject *handle_new(const Core *c, const Handle *h)
{
    word in[5] = { h->start, h->blocks, h->tokens, h->generation, c->pool_id };
    return made_of(&handles, 5, in);
}

/* ---- leases ---------------------------------------------------------------------------------- */

bool claimant(Claimant *claims, PyObject *means, PyObject *owner)
{
    *claims = (Claimant){ means, owner };
    return leases.type && guards.type && keys.type && PyTuple_Check(means)
           && PyTuple_GET_SIZE(means) == 3;
}

static void fill(PyObject *object, const Class *its, int which, PyObject *value)
{
    *slot_of(object, its, which) = Py_NewRef(value);
}

/* As `Lease(...)` makes it, of blocks that are complete. */
PyObject *lease_new(Core *c, const Claimant *claims, PyObject *handle, const Key *key,
                    const char *message, word length, PyObject *made)
{
    word in[4] = { key->slot, key->generation, key->holder, key->opened };
    PyObject *state = PyTuple_GET_ITEM(claims->means, 0);
    PyObject *lease = leases.type->tp_alloc(leases.type, 0);
    PyObject *guard = lease ? guards.type->tp_alloc(guards.type, 0) : NULL;
    PyObject *its_key = guard ? made_of(&keys, 4, in) : NULL;
    PyObject *data = !its_key ? NULL
                     : length ? PyBytes_FromStringAndSize(message, (Py_ssize_t)length)
                              : Py_NewRef(no_message);
    if (!data || PyList_Append(made, lease)) {
        Py_XDECREF(data);
        Py_XDECREF(its_key);
        Py_XDECREF(guard);
        Py_XSETREF(c->dropped, lease); /* without a key it ends nothing */
        return NULL;
    }
    fill(guard, &guards, GUARD_STATE, state);
    fill(guard, &guards, GUARD_IS_OPEN, Py_True);
    fill(guard, &guards, GUARD_IS_READY, Py_True);
    fill(lease, &leases, LEASE_HANDLE, handle);
    fill(lease, &leases, LEASE_STATE, state);
    fill(lease, &leases, LEASE_STREAMS, PyTuple_GET_ITEM(claims->means, 1));
    fill(lease, &leases, LEASE_TENSORS, PyTuple_GET_ITEM(claims->means, 2));
    fill(lease, &leases, LEASE_OWNER, claims->owner);
    fill(lease, &leases, LEASE_ORDER, Py_None);
    *slot_of(lease, &leases, LEASE_MESSAGE) = data;
    *slot_of(lease, &leases, LEASE_GUARD) = guard;
    *slot_of(lease, &leases, LEASE_KEY) = its_key;
    return lease;
}

int lease_key(PyObject *lease, Key *key)
{
    if (Py_TYPE(lease) != leases.type || !keys.type || !guards.type)
        return -1;
    PyObject *its_key = *slot_of(lease, &leases, LEASE_KEY);
    PyObject *guard = *slot_of(lease, &leases, LEASE_GUARD);
    word in[4];
    if (its_key == Py_None)
        return 0;
    if (*slot_of(lease, &leases, LEASE_ORDER) != Py_None || !its_key || Py_TYPE(its_key) != keys.type
        || !guard || Py_TYPE(guard) != guards.type || !numbers(its_key, &keys, 4, in))
        return -1;
    *key = (Key){ in[KEY_SLOT], in[KEY_GENERATION], in[KEY_HOLDER], in[KEY_OPENED] };
    return 1;
}

/* As `Lease._is_over`, after `lease_key` gave its key. */
void lease_is_over(PyObject *lease)
{
    PyObject *guard = *slot_of(lease, &leases, LEASE_GUARD);
    Py_SETREF(*slot_of(lease, &leases, LEASE_KEY), Py_NewRef(Py_None));
    Py_SETREF(*slot_of(guard, &guards, GUARD_IS_OPEN), Py_NewRef(Py_False));
}

/* ---- views ----------------------------------------------------------------------------------- */

/* As `BlockView(...)` makes it; NULL without an error: its class is not known. */
PyObject *view_new(PyObject *tensors, PyObject *handle, PyObject *guard, PyObject *owner, word token)
{
    PyObject *start = views.type ? PyLong_FromUnsignedLongLong(token) : NULL;
    PyObject *view = start ? views.type->tp_alloc(views.type, 0) : NULL;
    if (!view) {
        Py_XDECREF(start);
        return NULL;
    }
    fill(view, &views, VIEW_TENSORS, tensors);
    fill(view, &views, VIEW_HANDLE, handle);
    fill(view, &views, VIEW_GUARD, guard);
    fill(view, &views, VIEW_OWNER, owner);
    *slot_of(view, &views, VIEW_START_TOKEN) = start;
    return view;
}
