/* TVM's hooks on ONNX Runtime's threads, tensors of both, errors, and memory. */

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "library.h"

enum { ALIGNMENT = 64, MOST_TASKS = 64 };

/* ---- errors ---- */

OrtStatus *fail(const OrtApi *api, int code, const char *format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  return ORT(api, CreateStatus)(code, text);
}

OrtStatus *out_of_memory(const OrtApi *api) {
  return fail(api, ORT_FAIL, "sparsify: out of memory");
}

/* ---- TVM's hooks ---- */

typedef struct {
  void *barrier;
  int32_t tasks;
} Tasks;
typedef int Task(int task, Tasks *tasks, void *closure);

static _Thread_local const OrtApi *thread_api;
static _Thread_local OrtKernelContext *thread_context;
static _Thread_local char raised[384];

typedef struct {
  Task *run;
  void *closure;
  Tasks tasks;
  int failure;
  char message[sizeof raised];
} Loop;

static void run_task(void *closure, size_t task) {
  Loop *loop = closure;
  int failure = loop->run((int)task, &loop->tasks, loop->closure);
  /* The message is the failing thread's; one of them is enough. */
  if (failure && __sync_bool_compare_and_swap(&loop->failure, 0, failure))
    memcpy(loop->message, raised, sizeof raised);
}

/* As many parts as the machine has threads, twice for balance: the API does not tell how many
 * threads a session has, and a part too many costs nanoseconds. */
static int most_tasks(void) {
  static int known;
  if (!known) {
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    known = cores < 1 ? 2 : cores > MOST_TASKS / 2 ? MOST_TASKS : 2 * (int)cores;
  }
  return known;
}

static int launch(Task *run, void *closure, int asked) {
  Loop loop = {.run = run, .closure = closure, .tasks = {NULL, asked > 0 ? asked : most_tasks()}};
  const OrtApi *api = thread_api;
  if (!api) { /* a loop inside a task */
    loop.tasks.tasks = 1;
    return run(0, &loop.tasks, closure);
  }
  size_t total = (size_t)loop.tasks.tasks;
  thread_api = NULL;
  OrtStatus *status =
      ORT(api, KernelContext_ParallelFor)(thread_context, run_task, total, total, &loop);
  thread_api = api;
  if (status) {
    ORT(api, ReleaseStatus)(status);
    snprintf(raised, sizeof raised, "ONNX Runtime refused a parallel loop");
    return -1;
  }
  if (loop.failure) memcpy(raised, loop.message, sizeof raised);
  return loop.failure;
}

static void *workspace(int device, int id, uint64_t bytes, int code, int bits) {
  (void)device, (void)id, (void)code, (void)bits;
  return allocate(bytes);
}

static int free_workspace(int device, int id, void *memory) {
  (void)device, (void)id;
  release(memory);
  return 0;
}

/* The object file of the kernels has weak ones, which are null. */
int (*__TVMBackendParallelLaunch)(Task *, void *, int) = launch;
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = workspace;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = free_workspace;

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count);
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  size_t used = (size_t)snprintf(raised, sizeof raised, "%s: ", kind);
  for (int32_t i = 0; i < count && used < sizeof raised; ++i)
    used += (size_t)snprintf(raised + used, sizeof raised - used, "%s", parts[i]);
}

/* ---- kernels ---- */

enum { TVM_INTEGER = 1, TVM_NUMBER = 3, TVM_TENSOR = 7, DL_CPU = 1 };

void pass(Call *call, const void *data, Dtype dtype, int dims, ...) {
  static const uint8_t code[] = {[F32] = 2, [I32] = 0, [I64] = 0, [U8] = 6 /* bool */};
  static const uint8_t bits[] = {[F32] = 32, [I32] = 32, [I64] = 64, [U8] = 8};
  int32_t at = call->count++;
  va_list extents;
  va_start(extents, dims);
  for (int d = 0; d < dims; ++d) call->shape[at][d] = va_arg(extents, int64_t);
  va_end(extents);
  call->tensor[at] = (DlTensor){(void *)(uintptr_t)data, DL_CPU, 0, dims, code[dtype],
                                bits[dtype],             1,      call->shape[at], NULL, 0};
  call->argument[at] = (Any){TVM_TENSOR, 0, {.pointer = &call->tensor[at]}};
}

void pass_integer(Call *call, int64_t value) {
  call->argument[call->count++] = (Any){TVM_INTEGER, 0, {.integer = value}};
}

void pass_number(Call *call, double value) {
  call->argument[call->count++] = (Any){TVM_NUMBER, 0, {.number = value}};
}

OrtStatus *run(const OrtApi *api, OrtKernelContext *context, Kernel *kernel, Call *call) {
  Any result = {0};
  thread_api = api;
  thread_context = context;
  int32_t failure = kernel(NULL, call->argument, call->count, &result);
  thread_api = NULL;
  thread_context = NULL;
  return failure ? fail(api, ORT_FAIL, "sparsify: a kernel failed: %s", raised) : NULL;
}

/* ---- tensors ---- */

OrtStatus *tensor_of(const OrtApi *api, const OrtValue *value, Tensor *tensor) {
  OrtShape *shape;
  TRY(ORT(api, GetTensorTypeAndShape)(value, &shape));
  OrtStatus *status = ORT(api, GetTensorElementType)(shape, &tensor->type);
  if (!status) status = ORT(api, GetDimensionsCount)(shape, &tensor->dims);
  if (!status && tensor->dims > MAX_DIMS)
    status = fail(api, ORT_INVALID_ARGUMENT, "sparsify: a tensor has %zu dims, %d is the limit",
                  tensor->dims, MAX_DIMS);
  if (!status) status = ORT(api, GetDimensions)(shape, tensor->extent, tensor->dims);
  ORT(api, ReleaseTensorTypeAndShapeInfo)(shape);
  if (status) return status;
  return ORT(api, GetTensorMutableData)(value, &tensor->data);
}

OrtStatus *input_of(const OrtApi *api, OrtKernelContext *context, size_t index, Tensor *tensor) {
  const OrtValue *value;
  TRY(ORT(api, KernelContext_GetInput)(context, index, &value));
  return tensor_of(api, value, tensor);
}

OrtStatus *output_of(const OrtApi *api, OrtKernelContext *context, const int64_t *extents,
                     size_t dims, float **data) {
  OrtValue *value;
  void *memory;
  TRY(ORT(api, KernelContext_GetOutput)(context, 0, extents, dims, &value));
  TRY(ORT(api, GetTensorMutableData)(value, &memory));
  *data = memory;
  return NULL;
}

int64_t count_of(const Tensor *tensor, size_t first, size_t end) {
  int64_t count = 1;
  for (size_t d = first; d < end; ++d) count *= tensor->extent[d];
  return count;
}

int64_t tokens_of(const Tensor *tensor) {
  return count_of(tensor, 0, tensor->dims ? tensor->dims - 1 : 0);
}

/* ---- memory ---- */

void *allocate(size_t bytes) {
  return aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT);
}

void release(void *memory) { free(memory); }

/* Blocks that no call has at the moment. Each begins a line before what is lent. */
typedef struct Block {
  struct Block *next;
  size_t floats;
} Block;
static Block *idle;
static pthread_mutex_t idle_mutex = PTHREAD_MUTEX_INITIALIZER;

float *borrow(size_t floats) {
  pthread_mutex_lock(&idle_mutex);
  Block **best = NULL;
  for (Block **at = &idle; *at; at = &(*at)->next)
    if ((*at)->floats >= floats && (!best || (*at)->floats < (*best)->floats)) best = at;
  Block *block = best ? *best : NULL;
  if (block) {
    *best = block->next;
  } else if (idle) { /* too small: it would never be of use again */
    Block *small = idle;
    idle = small->next;
    release(small);
  }
  pthread_mutex_unlock(&idle_mutex);
  if (!block) {
    block = allocate(ALIGNMENT + floats * sizeof(float));
    if (!block) return NULL;
    block->floats = floats;
  }
  return (float *)((char *)block + ALIGNMENT);
}

void give_back(float *memory) {
  if (!memory) return;
  Block *block = (Block *)((char *)memory - ALIGNMENT);
  pthread_mutex_lock(&idle_mutex);
  block->next = idle;
  idle = block;
  pthread_mutex_unlock(&idle_mutex);
}

__attribute__((destructor)) static void release_idle(void) {
  while (idle) {
    Block *block = idle;
    idle = block->next;
    release(block);
  }
}
