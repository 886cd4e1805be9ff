/* Runs a .tflite file with one input and one output of fp32 in LiteRT on its CPU, by its C
 * interface.
 *
 *   litert_run MODEL INPUTS OUTPUTS --repeat N < FLOATS > FLOATS     INPUTS, OUTPUTS: how many floats
 *
 * The few functions that it needs are declared here by hand, since the package has no header. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct { /* an element type and a shape; its bytes are not looked into */
  int32_t words[18];
} Type;

extern int LiteRtCreateEnvironment(int, const void *, void **);
extern int LiteRtCreateModelFromFile(void *, const char *, void **);
extern int LiteRtGetModelSubgraph(void *, size_t, void **);
extern int LiteRtGetSubgraphInput(void *, size_t, void **);
extern int LiteRtGetSubgraphOutput(void *, size_t, void **);
extern int LiteRtGetRankedTensorType(void *, Type *);
extern int LiteRtCreateOptions(void **);
extern int LiteRtSetOptionsHardwareAccelerators(void *, int);
extern int LiteRtCreateCompiledModel(void *, void *, void *, void **);
extern int LiteRtCompiledModelIsFullyAccelerated(void *, _Bool *);
extern int LiteRtCreateTensorBufferFromHostMemory(const Type *, void *, size_t, void *, void **);
extern int LiteRtRunCompiledModel(void *, size_t, size_t, void **, size_t, void **);

enum { CPU = 1, ALIGNMENT = 64 };

static void check(int status, const char *what) {
  if (!status) return;
  fprintf(stderr, "litert_run: %s: status %d\n", what, status);
  exit(1);
}

/* A buffer over memory of the caller's, of which LiteRT wants whole cache lines. */
static void *buffer_of(void *tensor, size_t floats, float **data) {
  size_t bytes = (floats * sizeof **data + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  void *buffer;
  Type type;
  *data = aligned_alloc(ALIGNMENT, bytes + ALIGNMENT); /* XNNPACK reads a little further */
  if (!*data) exit(2);
  check(LiteRtGetRankedTensorType(tensor, &type), "type of a tensor");
  check(LiteRtCreateTensorBufferFromHostMemory(&type, *data, floats * sizeof **data, NULL, &buffer),
        "buffer");
  return buffer;
}

int main(int argc, char **argv) {
  if (argc != 6) return 2;
  size_t inputs = (size_t)atol(argv[2]), outputs = (size_t)atol(argv[3]);
  void *environment, *model, *graph, *tensor, *options, *compiled, *input, *output;
  float *given, *result;
  _Bool whole = 0;
  check(LiteRtCreateEnvironment(0, NULL, &environment), "environment");
  check(LiteRtCreateModelFromFile(environment, argv[1], &model), "model");
  check(LiteRtGetModelSubgraph(model, 0, &graph), "graph");
  check(LiteRtCreateOptions(&options), "options");
  check(LiteRtSetOptionsHardwareAccelerators(options, CPU), "options");
  check(LiteRtCreateCompiledModel(environment, model, options, &compiled), "compile");
  check(LiteRtCompiledModelIsFullyAccelerated(compiled, &whole), "accelerated");
  if (!whole) check(-1, "XNNPACK does not take the whole graph");
  check(LiteRtGetSubgraphInput(graph, 0, &tensor), "input");
  input = buffer_of(tensor, inputs, &given);
  check(LiteRtGetSubgraphOutput(graph, 0, &tensor), "output");
  output = buffer_of(tensor, outputs, &result);
  if (fread(given, sizeof *given, inputs, stdin) != inputs) return 2;
  for (int i = atoi(argv[5]); i > 0; --i)
    check(LiteRtRunCompiledModel(compiled, 0, 1, &input, 1, &output), "run");
  return fwrite(result, sizeof *result, outputs, stdout) != outputs;
}
