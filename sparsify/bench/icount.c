/* A plugin of QEMU that counts the guest's instructions: all, fused multiply-adds, other vector
 * instructions, loads, stores; and which inner loops they are in.
 *
 *   qemu-aarch64 -plugin icount.so PROGRAM       the counts go to stderr as JSON, at the end
 *
 * Classes are told by the disassembly. An inner loop is a block that ends in a branch to itself. The few functions that it needs are declared here by hand
 * (qemu/plugins API version 1), since distributions ship no header. */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t Id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
extern void qemu_plugin_register_vcpu_tb_trans_cb(Id, void (*)(Id, struct qemu_plugin_tb *));
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
extern char *qemu_plugin_insn_disas(const struct qemu_plugin_insn *);
extern uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
extern void qemu_plugin_register_atexit_cb(Id, void (*)(Id, void *), void *);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;

enum { ALL, FMA, VECTOR, LOADS, STORES, CLASSES, ADD = 0, LOOPS = 4096, SHOWN = 8 };
static const char *const names[CLASSES] = {"all", "fma", "vector", "loads", "stores"};
static uint64_t counts[CLASSES];

typedef struct {
  uint64_t address, instructions, runs;
  char *text; /* JSON strings with commas between */
} Loop;
static Loop loops[LOOPS];
static int loop_count;

static int begins(const char *text, const char *word) { return !strncmp(text, word, strlen(word)); }

/* ARM's vector registers have a dot and a shape, ARMv7's and RISC-V's instructions begin with v. */
static int is_vector(const char *text) {
  const char *dot = strstr(text, ".");
  return (begins(text, "v") && !begins(text, "vset")) ||
         (dot && strchr("1248", dot[1]) && dot[1] && dot > text && dot[-1] >= '0' && dot[-1] <= '9');
}

static int begins_one_of(const char *text, const char *const *words) {
  for (; *words; ++words)
    if (begins(text, *words)) return 1;
  return 0;
}

static int class_of(const char *text) {
  static const char *const fma[] = {"fml", "fmadd", "vfma", "vmla", NULL};
  static const char *const load[] = {"ld", "vld", "vle", "flw", "fld", "lw", NULL};
  static const char *const store[] = {"st", "vst", "vse", "fsw", "fsd", "sw", NULL};
  if (begins_one_of(text, fma)) return FMA;
  if (begins_one_of(text, load)) return LOADS;
  if (begins_one_of(text, store)) return STORES;
  return is_vector(text) ? VECTOR : ALL;
}

/* Appends an instruction as a JSON string. */
static char *joined(char *list, const char *text) {
  size_t length = list ? strlen(list) : 0;
  char *longer = realloc(list, length + strlen(text) + 4), *at = longer + length;
  if (length) *at++ = ',';
  *at++ = '"';
  for (; *text; ++text)
    if (*text != '"' && *text != '\\') *at++ = *text == '\t' ? ' ' : *text;
  strcpy(at, "\"");
  return longer;
}

static int branches_to(const char *text, uint64_t address) {
  const char *number = strstr(text, "0x");
  while (number && strtoull(number, NULL, 16) != address) number = strstr(number + 2, "0x");
  return number != NULL;
}

static void translated(Id id, struct qemu_plugin_tb *block) {
  uint64_t found[CLASSES] = {qemu_plugin_tb_n_insns(block)};
  uint64_t address = qemu_plugin_insn_vaddr(qemu_plugin_tb_get_insn(block, 0));
  char *list = NULL;
  int loop = 0;
  (void)id;
  for (size_t i = 0; i < found[ALL]; ++i) {
    char *text = qemu_plugin_insn_disas(qemu_plugin_tb_get_insn(block, i));
    if (!text) continue;
    int class = class_of(text);
    found[class] += class != ALL;
    list = joined(list, text);
    loop = i + 1 == found[ALL] && branches_to(text, address);
    free(text);
  }
  for (int class = 0; class < CLASSES; ++class)
    if (found[class])
      qemu_plugin_register_vcpu_tb_exec_inline(block, ADD, &counts[class], found[class]);
  if (loop && loop_count < LOOPS) {
    Loop *kept = &loops[loop_count++];
    *kept = (Loop){address, found[ALL], 0, list};
    qemu_plugin_register_vcpu_tb_exec_inline(block, ADD, &kept->runs, 1);
  } else {
    free(list);
  }
}

static int by_instructions(const void *a, const void *b) {
  uint64_t x = ((const Loop *)a)->instructions * ((const Loop *)a)->runs;
  uint64_t y = ((const Loop *)b)->instructions * ((const Loop *)b)->runs;
  return (x < y) - (x > y);
}

static void report(Id id, void *unused) {
  (void)id, (void)unused;
  qsort(loops, (size_t)loop_count, sizeof *loops, by_instructions);
  fprintf(stderr, "{");
  for (int class = 0; class < CLASSES; ++class)
    fprintf(stderr, "\"%s\": %" PRIu64 ", ", names[class], counts[class]);
  fprintf(stderr, "\"loops\": [");
  for (int i = 0; i < loop_count && i < SHOWN; ++i)
    fprintf(stderr, "%s{\"address\": %" PRIu64 ", \"runs\": %" PRIu64 ", \"text\": [%s]}",
            i ? ", " : "", loops[i].address, loops[i].runs, loops[i].text);
  fprintf(stderr, "]}\n");
}

EXPORT int qemu_plugin_install(Id id, const void *info, int argc, char **argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, report, NULL);
  return 0;
}
