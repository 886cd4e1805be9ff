/* What is wrong with a call: the message, and checks of the caller's tensors; for sparsify.c. */
#ifndef SPARSIFY_CHECKS_H
#define SPARSIFY_CHECKS_H

#include <string.h>

#include "sparsify.h"

static _Thread_local char message[256];

static void append(const char *text) {
  size_t used = strlen(message), length = strlen(text), room = sizeof message - 1 - used;
  if (length > room) length = room;
  memcpy(message + used, text, length);
  message[used + length] = 0;
}

static int add(int status, const char *what, const char *name, const char *why) {
  append(what);
  if (name) {
    append(" '");
    append(name);
    append("'");
  }
  append(why);
  return status;
}

static int fail(int status, const char *what, const char *name, const char *why) {
  message[0] = 0;
  return add(status, what, name, why);
}

/* ---- a run and its memory ---- */

typedef struct {
  const sparsify_entry *entry;
  const uint8_t *weights;
  const sparsify_tensor *inputs;
  sparsify_tensor *outputs;
  uint8_t *state, *arena;
  int64_t computed[SPARSIFY_MAX_COMPUTED];
} Run;

static int64_t size_of(int32_t size, const int64_t *computed) {
  return size >= 0 ? size : computed[-1 - size];
}

static int misaligned(const void *address) { return (uintptr_t)address % SPARSIFY_ALIGNMENT != 0; }

static size_t tensor_bytes(const sparsify_tensor *tensor, const sparsify_spec *spec) {
  size_t bytes = sparsify_item_bytes(spec->dtype);
  for (int d = 0; d < spec->dims; ++d) bytes *= (size_t)tensor->shape[d];
  return bytes;
}

static int check_memory(const sparsify_tensor *tensor, const sparsify_spec *spec,
                        const char *what) {
  if (!tensor->data) return fail(SPARSIFY_NULL, what, spec->name, " is null");
  if (misaligned(tensor->data))
    return fail(SPARSIFY_MISALIGNED, what, spec->name, " is misaligned");
  if (tensor->bytes < tensor_bytes(tensor, spec))
    return fail(SPARSIFY_WRONG_SIZE, what, spec->name, " has fewer bytes than its shape takes");
  return SPARSIFY_OK;
}

static int check(const sparsify_entry *entry, const sparsify_tensor *inputs,
                 sparsify_tensor *outputs, int64_t *computed) {
  for (int i = 0; i < entry->input_count; ++i) {
    const sparsify_spec *spec = &entry->inputs[i];
    for (int d = 0; d < spec->dims; ++d)
      if (inputs[i].shape[d] < spec->least[d] || inputs[i].shape[d] > spec->most[d])
        return fail(SPARSIFY_WRONG_SHAPE, "input", spec->name, " has a size out of its range");
  }
  if (!entry->compute(inputs, computed))
    return fail(SPARSIFY_WRONG_SHAPE, "the inputs", NULL,
                " have sizes that do not go through the model");
  for (int i = 0; i < entry->input_count; ++i) {
    const sparsify_spec *spec = &entry->inputs[i];
    const int32_t *sizes = entry->sizes + entry->values[i].shape;
    for (int d = 0; d < spec->dims; ++d)
      if (inputs[i].shape[d] != size_of(sizes[d], computed))
        return fail(SPARSIFY_WRONG_SHAPE, "input", spec->name,
                    " has a size that differs from another input's");
    int status = check_memory(&inputs[i], spec, "input");
    if (status) return status;
  }
  for (int i = 0; i < entry->output_count; ++i) {
    const sparsify_spec *spec = &entry->outputs[i];
    const int32_t *sizes = entry->sizes + entry->values[entry->input_count + i].shape;
    for (int d = 0; d < spec->dims; ++d) outputs[i].shape[d] = size_of(sizes[d], computed);
    int status = check_memory(&outputs[i], spec, "output");
    if (status) return status;
  }
  return SPARSIFY_OK;
}

/* Memory of a run, `bytes` of it. */
typedef struct {
  const char *what, *name;
  uintptr_t start;
  size_t bytes;
} Region;

/* The run's memory by number: outputs, workspace and state, which it writes to, inputs, weights. */
static Region region(const Run *run, int number) {
  const sparsify_entry *entry = run->entry;
  const int outputs = entry->output_count, inputs = outputs + 2 + entry->input_count;
  if (number < outputs) {
    const sparsify_tensor *output = &run->outputs[number];
    const sparsify_spec *spec = &entry->outputs[number];
    return (Region){"output", spec->name, (uintptr_t)output->data, tensor_bytes(output, spec)};
  }
  if (number == outputs)
    return (Region){"the workspace", NULL, (uintptr_t)run->arena, entry->workspace_bytes};
  if (number == outputs + 1)
    return (Region){"the state", NULL, (uintptr_t)run->state, entry->state_bytes};
  if (number == inputs)
    return (Region){"the weights", NULL, (uintptr_t)run->weights, entry->weights_bytes};
  const sparsify_tensor *input = &run->inputs[number - outputs - 2];
  const sparsify_spec *spec = &entry->inputs[number - outputs - 2];
  return (Region){"input", spec->name, (uintptr_t)input->data, tensor_bytes(input, spec)};
}

static int check_overlaps(const Run *run) {
  const int written = run->entry->output_count + 2, all = written + run->entry->input_count + 1;
  for (int i = 0; i < written; ++i) {
    Region one = region(run, i);
    for (int j = i + 1; one.bytes && j < all; ++j) {
      Region other = region(run, j);
      if (!other.bytes) continue;
      if (one.start - other.start >= other.bytes && other.start - one.start >= one.bytes) continue;
      fail(SPARSIFY_OVERLAP, one.what, one.name, " overlaps ");
      return add(SPARSIFY_OVERLAP, other.what, other.name, "");
    }
  }
  return SPARSIFY_OK;
}

#endif
