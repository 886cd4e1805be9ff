/* Runs an ONNX file of token ids in ONNX Runtime on one thread, by its C interface.
 *
 *   ort_run MODEL INPUT OUTPUT TOKENS --repeat N < IDS > FLOATS       IDS: TOKENS int64
 *
 * The interface is a table of functions that only grows; the numbers are their places in it. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
  void **(*api)(uint32_t);
  const char *(*version)(void);
} Base;
extern const Base *OrtGetApiBase(void);

enum { MESSAGE = 2, ENVIRONMENT, SESSION = 7, RUN = 9, OPTIONS, THREADS = 24, TENSOR = 49, DATA = 51,
       COUNT = 64, INFO = 65, MEMORY = 69, WARNING = 2, INT64 = 7, ARENA = 1 };
static void **api;

static void check(void *status) {
  if (!status) return;
  fprintf(stderr, "%s\n", ((const char *(*)(void *))api[MESSAGE])(status));
  exit(1);
}

int main(int argc, char **argv) {
  if (argc != 7) return 2;
  size_t tokens = (size_t)atol(argv[4]), floats;
  void *environment, *options, *session, *memory, *ids, *result = NULL, *info, *data;
  int64_t *given = malloc(tokens * sizeof *given), shape[] = {1, (int64_t)tokens};
  const char *input[] = {argv[2]}, *output[] = {argv[3]};
  if (fread(given, sizeof *given, tokens, stdin) != tokens) return 2;
  api = OrtGetApiBase()->api(17);
  check(((void *(*)(int, const char *, void **))api[ENVIRONMENT])(WARNING, "run", &environment));
  check(((void *(*)(void **))api[OPTIONS])(&options));
  check(((void *(*)(void *, int))api[THREADS])(options, 1));
  check(((void *(*)(void *, const char *, void *, void **))api[SESSION])(environment, argv[1],
                                                                         options, &session));
  check(((void *(*)(int, int, void **))api[MEMORY])(ARENA, 0, &memory));
  check(((void *(*)(void *, void *, size_t, const int64_t *, size_t, int, void **))api[TENSOR])(
      memory, given, tokens * sizeof *given, shape, 2, INT64, &ids));
  for (int i = atoi(argv[6]); i > 0; --i) {
    result = NULL;
    check(((void *(*)(void *, void *, const char *const *, void *const *, size_t,
                      const char *const *, size_t, void **))api[RUN])(session, NULL, input, &ids, 1,
                                                                      output, 1, &result));
  }
  check(((void *(*)(void *, void **))api[INFO])(result, &info));
  check(((void *(*)(void *, size_t *))api[COUNT])(info, &floats));
  check(((void *(*)(void *, void **))api[DATA])(result, &data));
  return fwrite(data, sizeof(float), floats, stdout) != floats;
}
