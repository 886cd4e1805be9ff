/* How parallel loops run: link serial.c, or threads.c with pool.c. */
#ifndef SPARSIFY_LAUNCH_H
#define SPARSIFY_LAUNCH_H

#include <stdint.h>

#include "sparsify.h"

typedef struct {
  void *barrier;
  int32_t tasks;
} sparsify_tasks;
typedef int sparsify_task(int task, sparsify_tasks *tasks, void *closure);

/* Runs every task of a loop; 0, or what the first failing task returned. */
int sparsify_launch(sparsify_task *run, void *closure, int tasks);

/* Whose kernels the calling thread runs. */
const sparsify_entry *sparsify_running(void);

/* Runs one task of a loop of `entry`, with the entry's scratch memory of this thread. If it fails,
 * what it took is free again. */
int sparsify_run_task(const sparsify_entry *entry, sparsify_task *run, int task,
                      sparsify_tasks *tasks, void *closure);

/* The calling thread's message, 256 bytes. */
char *sparsify_message(void);

#endif
