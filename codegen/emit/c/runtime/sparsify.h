/* What runs an exported model: the caller's side first, then the tables that the exporter fills. */
#ifndef SPARSIFY_H
#define SPARSIFY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SPARSIFY_ALIGNMENT 64 /* of every tensor, the weights and the workspace, in bytes */
#define SPARSIFY_MAX_DIMS 6

typedef enum {
  SPARSIFY_OK = 0,
  SPARSIFY_NULL = 1,           /* a pointer that must not be null is */
  SPARSIFY_WRONG_SHAPE = 2,    /* a size of an input is out of range, or differs between inputs */
  SPARSIFY_WRONG_SIZE = 3,     /* fewer bytes than the tensor, the weights or the workspace need */
  SPARSIFY_MISALIGNED = 4,     /* an address is no multiple of SPARSIFY_ALIGNMENT */
  SPARSIFY_WRONG_WEIGHTS = 5,  /* these weights belong to another model */
  SPARSIFY_NOT_READY = 6,      /* the model's or the state's init was not called, or it failed */
  SPARSIFY_KERNEL_FAILED = 7,  /* a kernel refused its arguments, an index out of range for one */
  SPARSIFY_OVERLAP = 8         /* memory that a run writes to overlaps other memory of that run */
} sparsify_status;

/* A tensor of the caller's: row-major, shape[0 .. dims). Outputs get their shape from the model. */
typedef struct {
  void *data;
  size_t bytes; /* at `data`; may be more than the tensor takes */
  int64_t shape[SPARSIFY_MAX_DIMS];
} sparsify_tensor;

typedef enum {
  SPARSIFY_FLOAT32,
  SPARSIFY_FLOAT64,
  SPARSIFY_FLOAT16,
  SPARSIFY_BFLOAT16,
  SPARSIFY_INT64,
  SPARSIFY_INT32,
  SPARSIFY_INT16,
  SPARSIFY_INT8,
  SPARSIFY_UINT8,
  SPARSIFY_BOOL
} sparsify_dtype;

/* What an input or output is. Where `least` and `most` differ, any size between them will do. */
typedef struct {
  const char *name;
  sparsify_dtype dtype;
  int dims;
  int64_t least[SPARSIFY_MAX_DIMS], most[SPARSIFY_MAX_DIMS];
} sparsify_spec;

/* The bytes of one element. */
size_t sparsify_item_bytes(sparsify_dtype dtype);

/* Threads of one run from now on, the caller's included. A program linked with serial.c has one,
 * and returns SPARSIFY_WRONG_SIZE for more. */
int sparsify_set_threads(int threads);

/* What was wrong with the calling thread's last failing call; "" when none failed. */
const char *sparsify_last_error(void);

/* ---- the exporter's tables ---- */

/* Of what several threads may set and read. Where C has no atomics, init must have returned before
 * another thread calls the model. */
#ifdef __STDC_NO_ATOMICS__
#define SPARSIFY_ATOMIC
#else
#define SPARSIFY_ATOMIC _Atomic
#endif

typedef struct {
  uint8_t where; /* SPARSIFY_IN_... */
  uint8_t dtype, dims;
  uint16_t shape; /* the first of its sizes in `sizes` */
  uint32_t index; /* an input's or output's place, else an offset in units of the alignment */
} sparsify_value;
enum {
  SPARSIFY_IN_INPUT,
  SPARSIFY_IN_OUTPUT,
  SPARSIFY_IN_WEIGHTS,
  SPARSIFY_IN_STATE,
  SPARSIFY_IN_ARENA
};

typedef struct {
  int32_t type; /* TVM's number of it */
  uint32_t zero;
  union {
    int64_t integer;
    void *pointer;
  } value;
} sparsify_any;
typedef int32_t sparsify_kernel(void *, sparsify_any *, int32_t, sparsify_any *);

typedef struct {
  sparsify_kernel *kernel; /* NULL: copy the first operand to the second */
  uint16_t first, count;   /* its operands: values, or SPARSIFY_SIZE + a place in `sizes` */
} sparsify_call;
#define SPARSIFY_SIZE 0x8000

typedef struct sparsify_entry {
  const char *name;
  const sparsify_spec *inputs, *outputs;
  uint16_t input_count, output_count;
  uint32_t call_count;
  const sparsify_value *values; /* those of inputs first, then those of outputs */
  const int32_t *sizes;         /* a size, or -1 - its place among those computed at run time */
  const uint16_t *operands;
  const sparsify_call *calls;
  /* Fills in those sizes; 0 when sizes differ that the model needs to be the same. */
  int (*compute)(const sparsify_tensor *inputs, int64_t *computed);
  void *(*scratch)(void); /* the calling thread's memory for kernels: scratch_bytes, aligned */
  size_t workspace_bytes, scratch_bytes, state_bytes, weights_bytes;
} sparsify_entry;
#define SPARSIFY_MAX_COMPUTED 64

/* Arithmetic of sizes; divisions round towards minus infinity. */
static inline int64_t sparsify_floordiv(int64_t a, int64_t b) { return a / b - (a % b < 0); }
static inline int64_t sparsify_floormod(int64_t a, int64_t b) {
  return a % b + (a % b < 0 ? b : 0);
}
static inline int64_t sparsify_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t sparsify_max(int64_t a, int64_t b) { return a > b ? a : b; }

int sparsify_check_weights(const void *weights, size_t bytes, const void *identity,
                           size_t expected_bytes);

/* A tensor of the state that is not zero at first: offsets in the state and in the weights. */
typedef struct {
  size_t state, weights, bytes;
} sparsify_initial;

/* Gives a state its first values, if it can lie there: zero but for `count` tensors. */
int sparsify_begin_state(void *memory, size_t bytes, size_t expected_bytes, const void *weights,
                         const sparsify_initial *initial, int count);

/* `entry` may be null, for one that does not exist: an error as any other.
 * `state` points to the address of the state, and is not read for an entry without one. */
int sparsify_run(const sparsify_entry *entry, const void *weights, const sparsify_tensor *inputs,
                 sparsify_tensor *outputs, void *const *state, void *workspace,
                 size_t workspace_bytes);

#ifdef __cplusplus
}
#endif
#endif
