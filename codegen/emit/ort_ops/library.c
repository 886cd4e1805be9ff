/* The library's only symbol: RegisterCustomOps, which ONNX Runtime calls for a session. */

#include <limits.h>
#include <string.h>

#include "library.h"

static const Implementation *const families[] = {
    [LINEAR] = &linear_family,       [LAYER_NORM] = &norm_family, [RMS_NORM] = &norm_family,
    [ATTENTION] = &attention_family, [ROTARY] = &rotary_family,   [GATED] = &gated_family,
};

static const Operator *of(const OrtCustomOp *op) { return (const Operator *)op; }

static const char *name(const OrtCustomOp *op) { return of(op)->name; }
static const char *provider(const OrtCustomOp *op) {
  (void)op;
  return "CPUExecutionProvider";
}
static size_t inputs(const OrtCustomOp *op) { return of(op)->inputs; }
static int input_type(const OrtCustomOp *op, size_t i) { return of(op)->input_type[i]; }
static size_t outputs(const OrtCustomOp *op) {
  (void)op;
  return 1;
}
static int output_type(const OrtCustomOp *op, size_t i) {
  (void)op, (void)i;
  return ORT_FLOAT;
}
static int zero_of(const OrtCustomOp *op, size_t i) { /* required; in the CPU's memory */
  (void)op, (void)i;
  return 0;
}
static int one(const OrtCustomOp *op) {
  (void)op;
  return 1;
}
static int latest(const OrtCustomOp *op) {
  (void)op;
  return INT_MAX;
}
static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info,
                         void **made) {
  return families[of(op)->family]->create(of(op), api, info, made);
}

/* A feature that is not known here counts as missing. */
static bool has(const char *feature) {
#if defined(__x86_64__)
#define KNOWN(text) \
  if (strcmp(feature, text) == 0) return __builtin_cpu_supports(text)
  __builtin_cpu_init();
  KNOWN("avx2");
  KNOWN("fma");
  KNOWN("bmi2");
  KNOWN("avx512f");
  KNOWN("avx512bw");
  KNOWN("avx512dq");
  KNOWN("avx512vl");
  KNOWN("avx512vbmi2");
#endif
  (void)feature;
  return false;
}

static const char *missing_feature(void) {
  for (const char *const *feature = required_features; *feature; ++feature)
    if (!has(*feature)) return *feature;
  return NULL;
}

static void fill(Operator *op) {
  op->op = (OrtCustomOp){
      .version = ORT_VERSION,
      .GetName = name,
      .GetExecutionProviderType = provider,
      .GetInputType = input_type,
      .GetInputTypeCount = inputs,
      .GetOutputType = output_type,
      .GetOutputTypeCount = outputs,
      .KernelDestroy = families[op->family]->destroy,
      .GetInputCharacteristic = zero_of,
      .GetOutputCharacteristic = zero_of,
      .GetInputMemoryType = zero_of,
      .GetVariadicInputMinArity = one,
      .GetVariadicInputHomogeneity = one,
      .GetVariadicOutputMinArity = one,
      .GetVariadicOutputHomogeneity = one,
      .CreateKernelV2 = create,
      .KernelComputeV2 = families[op->family]->compute,
      .GetStartVersion = one,
      .GetEndVersion = latest,
  };
}

__attribute__((constructor)) static void fill_all(void) {
  for (size_t i = 0; i < operator_count; ++i) fill(&operators[i]);
}

__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                    const OrtApiBase *base);
OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  const OrtApi *api = base->GetApi(ORT_VERSION);
  if (!api) return NULL; /* before 1.17: the function bodies in the file run */
  const char *feature = missing_feature();
  if (feature)
    return fail(api, ORT_NOT_IMPLEMENTED,
                "sparsify: this library was built for %s, which needs the CPU feature %s, and this "
                "CPU lacks it; build one with `sparsify build-ort-ops --target native`, or leave "
                "it out: the file runs without it",
                target_name, feature);
  OrtCustomOpDomain *domain;
  TRY(ORT(api, CreateCustomOpDomain)("sparsify", &domain));
  for (size_t i = 0; i < operator_count; ++i)
    TRY(ORT(api, CustomOpDomain_Add)(domain, &operators[i].op));
  return ORT(api, AddCustomOpDomain)(options, domain);
}
