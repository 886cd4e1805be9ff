/* Runs a model's tables: checks what the caller gives, then calls kernel after kernel.
 *
 * Nothing is allocated. Kernels get their tensors as DLPack's DLTensor, in TVM's calling
 * convention; what TVM's own runtime would give them is at the end of this file. */

#include "sparsify.h"

#include <string.h>

#include "checks.h"
#include "launch.h"

typedef struct {
  void *data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} Tensor;

enum { MAX_OPERANDS = 32, CPU = 1, ANY_INTEGER = 1, ANY_TENSOR = 7 };

static const struct {
  uint8_t code, bits; /* DLPack's */
} types[] = {
    [SPARSIFY_FLOAT32] = {2, 32}, [SPARSIFY_FLOAT64] = {2, 64}, [SPARSIFY_FLOAT16] = {2, 16},
    [SPARSIFY_BFLOAT16] = {4, 16}, [SPARSIFY_INT64] = {0, 64},  [SPARSIFY_INT32] = {0, 32},
    [SPARSIFY_INT16] = {0, 16},   [SPARSIFY_INT8] = {0, 8},     [SPARSIFY_UINT8] = {1, 8},
    [SPARSIFY_BOOL] = {6, 8},
};

size_t sparsify_item_bytes(sparsify_dtype dtype) { return types[dtype].bits / 8; }

/* Whose kernels the calling thread runs, and how much of its scratch memory they have. */
static _Thread_local const sparsify_entry *running;
static _Thread_local size_t scratch_used;

static const char NOT_INITIALISED[] = " was not initialised";

const char *sparsify_last_error(void) { return message; }
char *sparsify_message(void) { return message; }

/* A kernel's refusal: the parts make the message. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count);
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  message[0] = 0;
  append(kind);
  append(": ");
  for (int32_t i = 0; i < count; ++i) append(parts[i]);
}

int sparsify_check_weights(const void *weights, size_t bytes, const void *identity,
                           size_t expected_bytes) {
  if (!weights) return fail(SPARSIFY_NULL, "the weights", NULL, " are null");
  if (misaligned(weights)) return fail(SPARSIFY_MISALIGNED, "the weights", NULL, " are misaligned");
  if (bytes < expected_bytes)
    return fail(SPARSIFY_WRONG_SIZE, "the weights", NULL, " are too short: a damaged file?");
  if (memcmp(weights, identity, SPARSIFY_ALIGNMENT) != 0)
    return fail(SPARSIFY_WRONG_WEIGHTS, "the weights", NULL, " are those of another model");
  return SPARSIFY_OK;
}

int sparsify_begin_state(void *memory, size_t bytes, size_t expected_bytes, const void *weights,
                         const sparsify_initial *initial, int count) {
  if (!memory) return fail(SPARSIFY_NULL, "the memory of the state", NULL, " is null");
  if (misaligned(memory))
    return fail(SPARSIFY_MISALIGNED, "the memory of the state", NULL, " is misaligned");
  if (bytes < expected_bytes)
    return fail(SPARSIFY_WRONG_SIZE, "the memory of the state", NULL, " is too small");
  if (count && !weights) return fail(SPARSIFY_NOT_READY, "the model", NULL, NOT_INITIALISED);
  memset(memory, 0, expected_bytes);
  for (int i = 0; i < count; ++i)
    memcpy((uint8_t *)memory + initial[i].state, (const uint8_t *)weights + initial[i].weights,
           initial[i].bytes);
  return SPARSIFY_OK;
}

/* ---- the run ---- */

static void *address(const Run *run, const sparsify_value *value) {
  switch (value->where) {
    case SPARSIFY_IN_INPUT: return run->inputs[value->index].data;
    case SPARSIFY_IN_OUTPUT: return run->outputs[value->index].data;
    case SPARSIFY_IN_STATE: return run->state + (size_t)value->index * SPARSIFY_ALIGNMENT;
    case SPARSIFY_IN_ARENA: return run->arena + (size_t)value->index * SPARSIFY_ALIGNMENT;
    default: /* kernels only read weights */
      return (void *)(uintptr_t)(run->weights + (size_t)value->index * SPARSIFY_ALIGNMENT);
  }
}

static void copy(const Run *run, const uint16_t *operands) {
  const sparsify_value *from = &run->entry->values[operands[0]];
  size_t bytes = sparsify_item_bytes((sparsify_dtype)from->dtype);
  for (int d = 0; d < from->dims; ++d)
    bytes *= (size_t)size_of(run->entry->sizes[from->shape + d], run->computed);
  memcpy(address(run, &run->entry->values[operands[1]]), address(run, from), bytes);
}

static int32_t call(const Run *run, const sparsify_call *step) {
  const uint16_t *operands = run->entry->operands + step->first;
  sparsify_any arguments[MAX_OPERANDS], result;
  Tensor tensors[MAX_OPERANDS];
  int64_t shapes[MAX_OPERANDS][SPARSIFY_MAX_DIMS];
  if (!step->kernel) {
    copy(run, operands);
    return 0;
  }
  memset(arguments, 0, sizeof arguments);
  memset(&result, 0, sizeof result);
  for (int i = 0; i < step->count; ++i) {
    int32_t type = ANY_TENSOR;
    if (operands[i] & SPARSIFY_SIZE) {
      int32_t size = run->entry->sizes[operands[i] & ~SPARSIFY_SIZE];
      type = ANY_INTEGER;
      arguments[i].value.integer = size_of(size, run->computed);
    } else {
      const sparsify_value *value = &run->entry->values[operands[i]];
      for (int d = 0; d < value->dims; ++d)
        shapes[i][d] = size_of(run->entry->sizes[value->shape + d], run->computed);
      tensors[i] = (Tensor){.data = address(run, value),
                            .device_type = CPU,
                            .dims = value->dims,
                            .code = types[value->dtype].code,
                            .bits = types[value->dtype].bits,
                            .lanes = 1,
                            .shape = shapes[i]};
      arguments[i].value.pointer = &tensors[i];
    }
    arguments[i].type = type;
  }
  return step->kernel(NULL, arguments, step->count, &result);
}

int sparsify_run(const sparsify_entry *entry, const void *weights, const sparsify_tensor *inputs,
                 sparsify_tensor *outputs, void *const *state, void *workspace,
                 size_t workspace_bytes) {
  Run run = {entry, weights, inputs, outputs, NULL, workspace, {0}};
  if (!entry) return fail(SPARSIFY_NULL, "the entry", NULL, " does not exist");
  if (!weights) return fail(SPARSIFY_NOT_READY, "the model", NULL, NOT_INITIALISED);
  if ((!inputs && entry->input_count) || (!outputs && entry->output_count))
    return fail(SPARSIFY_NULL, "inputs or outputs", NULL, " are null");
  if (entry->state_bytes) {
    if (!state) return fail(SPARSIFY_NULL, "the state", NULL, " is null");
    if (!*state) return fail(SPARSIFY_NOT_READY, "the state", NULL, NOT_INITIALISED);
    run.state = *state;
  }
  if (!workspace && entry->workspace_bytes)
    return fail(SPARSIFY_NULL, "the workspace", NULL, " is null");
  if (misaligned(workspace))
    return fail(SPARSIFY_MISALIGNED, "the workspace", NULL, " is misaligned");
  if (workspace_bytes < entry->workspace_bytes)
    return fail(SPARSIFY_WRONG_SIZE, "the workspace", NULL, " is too small");
  int status = check(entry, inputs, outputs, run.computed);
  if (!status) status = check_overlaps(&run);
  if (status) return status;
  running = entry;
  scratch_used = 0; /* a kernel that failed outside of its tasks gave nothing back */
  for (uint32_t i = 0; i < entry->call_count; ++i)
    if (call(&run, &entry->calls[i]) != 0) return SPARSIFY_KERNEL_FAILED;
  return SPARSIFY_OK;
}

/* ---- what kernels expect of a runtime ---- */

/* Blocks are given back in the reverse order; scratch_bytes is a multiple of the alignment. */
static void *take_scratch(int device_type, int device, uint64_t bytes, int code, int bits) {
  (void)device_type, (void)device, (void)code, (void)bits;
  if (!running || bytes > running->scratch_bytes - scratch_used) {
    fail(SPARSIFY_KERNEL_FAILED, "a kernel", NULL, " takes more scratch memory than was foreseen");
    return NULL;
  }
  uint8_t *block = (uint8_t *)running->scratch() + scratch_used;
  scratch_used +=
      ((size_t)bytes + SPARSIFY_ALIGNMENT - 1) / SPARSIFY_ALIGNMENT * SPARSIFY_ALIGNMENT;
  return block;
}

static int give_scratch(int device_type, int device, void *block) {
  (void)device_type, (void)device;
  scratch_used = (size_t)((uint8_t *)block - (uint8_t *)running->scratch());
  return 0;
}

const sparsify_entry *sparsify_running(void) { return running; }

int sparsify_run_task(const sparsify_entry *entry, sparsify_task *run, int task,
                      sparsify_tasks *tasks, void *closure) {
  size_t before = scratch_used;
  running = entry;
  int status = run(task, tasks, closure);
  if (status != 0) scratch_used = before;
  return status;
}

/* Kernels reach these through pointers by TVM's names. */
extern int (*__TVMBackendParallelLaunch)(sparsify_task *, void *, int);
extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
extern int (*__TVMBackendFreeWorkspace)(int, int, void *);
int (*__TVMBackendParallelLaunch)(sparsify_task *, void *, int) = sparsify_launch;
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = take_scratch;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = give_scratch;
