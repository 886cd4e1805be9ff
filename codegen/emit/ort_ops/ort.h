/* ONNX Runtime's C ABI for custom operators, as far as it is used: API version 17 (release 1.17).
 *
 * OrtApi is a table of functions that is only ever appended to, so a slot's number is its contract.
 * Source: onnxruntime_c_api.h, whose declarations the casts below repeat. */
#ifndef SPARSIFY_ORT_H
#define SPARSIFY_ORT_H

#include <stddef.h>
#include <stdint.h>

#define ORT_VERSION 17

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtTensorTypeAndShapeInfo OrtShape;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtApi OrtApi;

struct OrtApi {
  void *slot[512];
};
typedef struct {
  const OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} OrtApiBase;

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_NOT_IMPLEMENTED = 9 };
enum {
  ORT_ANY = 0,
  ORT_FLOAT = 1,
  ORT_UINT8 = 2,
  ORT_UINT16 = 4,
  ORT_INT32 = 6,
  ORT_INT64 = 7,
  ORT_BOOL = 9,
  ORT_BFLOAT16 = 16
};

typedef struct OrtCustomOp OrtCustomOp;
struct OrtCustomOp {
  uint32_t version;
  void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
  const char *(*GetName)(const OrtCustomOp *);
  const char *(*GetExecutionProviderType)(const OrtCustomOp *);
  int (*GetInputType)(const OrtCustomOp *, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp *);
  int (*GetOutputType)(const OrtCustomOp *, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp *);
  void (*KernelCompute)(void *, OrtKernelContext *);
  void (*KernelDestroy)(void *);
  int (*GetInputCharacteristic)(const OrtCustomOp *, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp *, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp *);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
  OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
  OrtStatus *(*KernelComputeV2)(void *, OrtKernelContext *);
  OrtStatus *(*InferOutputShape)(const OrtCustomOp *, void *);
  int (*GetStartVersion)(const OrtCustomOp *);
  int (*GetEndVersion)(const OrtCustomOp *);
};

typedef void ort_loop_body(void *closure, size_t index);

/* ORT(api, name)(...) calls a slot with its type. */
#define ORT(api, name) ((ort_##name *)(api)->slot[ORT_SLOT_##name])
enum {
  ORT_SLOT_CreateStatus = 0,
  ORT_SLOT_CreateCustomOpDomain = 26,
  ORT_SLOT_CustomOpDomain_Add = 27,
  ORT_SLOT_AddCustomOpDomain = 28,
  ORT_SLOT_GetTensorMutableData = 51,
  ORT_SLOT_GetTensorElementType = 60,
  ORT_SLOT_GetDimensionsCount = 61,
  ORT_SLOT_GetDimensions = 62,
  ORT_SLOT_GetTensorTypeAndShape = 65,
  ORT_SLOT_KernelInfoGetAttribute_float = 85,
  ORT_SLOT_KernelInfoGetAttribute_int64 = 86,
  ORT_SLOT_KernelContext_GetInput = 90,
  ORT_SLOT_KernelContext_GetOutput = 91,
  ORT_SLOT_ReleaseStatus = 93,
  ORT_SLOT_ReleaseTensorTypeAndShapeInfo = 99,
  ORT_SLOT_KernelInfoGetAttributeArray_int64 = 163,
  ORT_SLOT_KernelInfoGetConstantInput_tensor = 249,
  ORT_SLOT_KernelContext_ParallelFor = 274
};
typedef OrtStatus *ort_CreateStatus(int code, const char *message);
typedef OrtStatus *ort_CreateCustomOpDomain(const char *name, OrtCustomOpDomain **domain);
typedef OrtStatus *ort_CustomOpDomain_Add(OrtCustomOpDomain *domain, const OrtCustomOp *op);
typedef OrtStatus *ort_AddCustomOpDomain(OrtSessionOptions *options, OrtCustomOpDomain *domain);
typedef OrtStatus *ort_GetTensorMutableData(const OrtValue *value, void **data);
typedef OrtStatus *ort_GetTensorElementType(const OrtShape *shape, int *type);
typedef OrtStatus *ort_GetDimensionsCount(const OrtShape *shape, size_t *count);
typedef OrtStatus *ort_GetDimensions(const OrtShape *shape, int64_t *extents, size_t count);
typedef OrtStatus *ort_GetTensorTypeAndShape(const OrtValue *value, OrtShape **shape);
typedef OrtStatus *ort_KernelInfoGetAttribute_float(const OrtKernelInfo *, const char *, float *);
typedef OrtStatus *ort_KernelInfoGetAttribute_int64(const OrtKernelInfo *, const char *, int64_t *);
typedef OrtStatus *ort_KernelContext_GetInput(const OrtKernelContext *, size_t, const OrtValue **);
typedef OrtStatus *ort_KernelContext_GetOutput(OrtKernelContext *, size_t index,
                                               const int64_t *extents, size_t count, OrtValue **);
typedef void ort_ReleaseStatus(OrtStatus *status);
typedef void ort_ReleaseTensorTypeAndShapeInfo(OrtShape *shape);
typedef OrtStatus *ort_KernelInfoGetAttributeArray_int64(const OrtKernelInfo *, const char *name,
                                                         int64_t *values, size_t *count);
typedef OrtStatus *ort_KernelInfoGetConstantInput_tensor(const OrtKernelInfo *, size_t index,
                                                         int *constant, const OrtValue **value);
typedef OrtStatus *ort_KernelContext_ParallelFor(const OrtKernelContext *, ort_loop_body *body,
                                                 size_t total, size_t batches, void *closure);

#endif
