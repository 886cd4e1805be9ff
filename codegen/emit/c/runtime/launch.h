/* How parallel loops run: link serial.c, or threads.c with pool.c. */
#ifndef SPARSIFY_LAUNCH_H
#define SPARSIFY_LAUNCH_H

#include <stdint.h>

typedef struct {
  void *barrier;
  int32_t tasks;
} sparsify_tasks;
typedef int sparsify_task(int task, sparsify_tasks *tasks, void *closure);

/* Runs every task of a loop; 0, or what the first failing task returned. */
int sparsify_launch(sparsify_task *run, void *closure, int tasks);

/* Runs one task. If it fails, what it took of the thread's scratch memory is free again. */
int sparsify_run_task(sparsify_task *run, int task, sparsify_tasks *tasks, void *closure);

/* The calling thread's message, 256 bytes. */
char *sparsify_message(void);

#endif
