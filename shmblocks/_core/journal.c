/* The redo journal, as shmblocks/_state/journal.py has it: the store of the length commits. */
#include "core.h"

void commit(Segment *s, const Store *stores, int how_many)
{
    word *log = s->words + s->journal, *next = log + 1;
    for (int i = 0; i < how_many; i++) {
        put(next++, stores[i].at * WORD);
        put(next++, stores[i].count * WORD);
        for (word k = 0; k < stores[i].count; k++)
            put(next++, stores[i].data[k]);
    }
    put(log, (word)(next - log - 1) * WORD); /* this one commits */
    for (int i = 0; i < how_many; i++)
        for (word k = 0; k < stores[i].count; k++)
            put(s->words + stores[i].at + k, stores[i].data[k]);
    put(log, 0);
}
