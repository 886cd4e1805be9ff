/* What the files of the library share: tensors of ONNX Runtime, kernels of ours, and memory. */
#ifndef SPARSIFY_LIBRARY_H
#define SPARSIFY_LIBRARY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ort.h"

/* ---- tensors of ONNX Runtime ---- */

#define MAX_DIMS 8
typedef struct {
  void *data;
  int type; /* ORT_... */
  size_t dims;
  int64_t extent[MAX_DIMS];
} Tensor;

OrtStatus *fail(const OrtApi *api, int code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
OrtStatus *tensor_of(const OrtApi *api, const OrtValue *value, Tensor *tensor);
OrtStatus *input_of(const OrtApi *api, OrtKernelContext *context, size_t index, Tensor *tensor);
OrtStatus *output_of(const OrtApi *api, OrtKernelContext *context, const int64_t *extents,
                     size_t dims, float **data);
/* The product of all extents from `first` up to `end`. */
int64_t count_of(const Tensor *tensor, size_t first, size_t end);
/* All but the last, which is the number of features. */
int64_t tokens_of(const Tensor *tensor);

#define TRY(expression)                 \
  do {                                  \
    OrtStatus *failed_ = (expression);  \
    if (failed_) return failed_;        \
  } while (0)

/* ---- kernels, in TVM's calling convention ---- */

typedef struct {
  int32_t type;
  uint32_t zero;
  union {
    int64_t integer;
    double number;
    void *pointer;
  } value;
} Any;
typedef int32_t Kernel(void *handle, Any *arguments, int32_t count, Any *result);

typedef enum { F32, I32, I64, U8 } Dtype;
#define MAX_ARGUMENTS 32

/* DLPack's DLTensor. */
typedef struct {
  void *data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} DlTensor;

typedef struct {
  int32_t count;
  Any argument[MAX_ARGUMENTS];
  DlTensor tensor[MAX_ARGUMENTS];
  int64_t shape[MAX_ARGUMENTS][4];
} Call;

/* Adds an argument; of a tensor, its extents follow, `dims` of them. */
void pass(Call *call, const void *data, Dtype dtype, int dims, ...);
void pass_integer(Call *call, int64_t value);
void pass_number(Call *call, double value);
/* Runs a kernel whose loops share the threads of the context. */
OrtStatus *run(const OrtApi *api, OrtKernelContext *context, Kernel *kernel, Call *call);

/* ---- memory, aligned as kernels need it ---- */

void *allocate(size_t bytes);
void release(void *memory);
/* Memory for one call, which the next one may use: no system call and no page fault when warm. */
float *borrow(size_t floats);
void give_back(float *memory);

OrtStatus *out_of_memory(const OrtApi *api);

/* ---- operators ---- */

/* What the table that is generated from the domain says of an operator. */
typedef enum { LINEAR, LAYER_NORM, RMS_NORM, ATTENTION, ROTARY, GATED } Family;
typedef enum { CSR, BITMAP, DENSE } Storage;
typedef enum { MASK_NONE, MASK_BOOL, MASK_FLOAT } MaskKind;
typedef struct {
  OrtCustomOp op; /* first: ONNX Runtime hands its address back */
  const char *name;
  Family family;
  uint8_t inputs;
  uint8_t input_type[8]; /* ORT_ANY where several are allowed, or one that is no float */
  Storage storage;
  int activation; /* place among the activations */
  bool bias, residual, causal, listed, window, softcap; /* the last two: attributes */
  bool active, gated; /* zeros among the inputs, or in a gate of the outputs, are skipped */
  MaskKind mask;
} Operator;

extern Operator operators[];
extern const size_t operator_count;

/* Each makes a kernel, computes and frees one. */
typedef struct {
  OrtStatus *(*create)(const Operator *, const OrtApi *, const OrtKernelInfo *, void **made);
  OrtStatus *(*compute)(void *made, OrtKernelContext *context);
  void (*destroy)(void *made);
} Implementation;
extern const Implementation linear_family, norm_family, attention_family, rotary_family,
    gated_family;

/* ---- generated: the kernels there are, and what the cost model says of them ---- */

#define ACTIVATIONS 6 /* none and relu among them */

typedef struct {
  Kernel *to_tiles, *multiply;
  Kernel *from_tiles[ACTIVATIONS], *from_tiles_residual; /* the latter without an activation */
  int64_t rows;                                           /* of a group or panel */
} TiledKernels;
extern const TiledKernels sell_kernels, dense_kernels;
extern Kernel *const sell_rows_kernel, *const dense_rows_kernel;
extern Kernel *const columns_kernel, *const gated_rows_kernel;
extern Kernel *const finish_rows_kernels[ACTIVATIONS];
extern Kernel *const layer_norm_kernel, *const rms_norm_kernel, *const rotary_kernel;
extern Kernel *const gated_kernels[ACTIVATIONS];
extern Kernel *const to_lanes_kernel, *const from_lanes_kernel;
extern Kernel *const attention_kernels[6]; /* no mask, by key, by query too; three of lists */
extern Kernel *const mask_kernels[2];         /* of bool, of float */

/* Cycles in tiles: of a nonzero, of a sum in a K block, of a weight if all are multiplied. */
typedef struct {
  double nonzero, sum, weight;
} TileCosts;
extern const TileCosts few_costs, many_costs; /* up to 16 tokens; 128 */
/* Cycles of rows: of a nonzero for one token, and for eight; of a group of rows in a K block; of a
 * feature that eight tokens bring or get; of a weight of the matrix, once and for each token. */
typedef struct {
  double nonzero_of_one, nonzero, group, feature, weight, weight_token;
} RowCosts;
extern const RowCosts row_costs;
extern const int64_t few_tokens, dense_rows_unit; /* up to so many tokens stay rows */
extern const int64_t sell_widest_block, sell_window_rows;

extern const char target_name[];
extern const char *const required_features[]; /* as __builtin_cpu_supports has them; NULL ends */

#endif
