/* A plugin of QEMU that counts the guest's instructions: all, fused multiply-adds, loads, stores.
 *
 *   qemu-aarch64 -plugin icount.so PROGRAM       the counts go to stderr as JSON, at the end
 *
 * Classes are told by the disassembly. The few functions that it needs are declared here by hand
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
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
extern void qemu_plugin_register_atexit_cb(Id, void (*)(Id, void *), void *);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;

enum { ALL, FMA, LOADS, STORES, CLASSES, ADD = 0 };
static uint64_t counts[CLASSES];

static int begins(const char *text, const char *word) { return !strncmp(text, word, strlen(word)); }

static void translated(Id id, struct qemu_plugin_tb *block) {
  uint64_t found[CLASSES] = {qemu_plugin_tb_n_insns(block)};
  (void)id;
  for (size_t i = 0; i < found[ALL]; ++i) {
    char *text = qemu_plugin_insn_disas(qemu_plugin_tb_get_insn(block, i));
    if (!text) continue;
    found[FMA] += begins(text, "fml") || begins(text, "fmadd") || begins(text, "vfma") ||
                  begins(text, "vmla") || begins(text, "vfmacc");
    found[LOADS] += begins(text, "ld") || begins(text, "vld") || begins(text, "vle");
    found[STORES] += begins(text, "st") || begins(text, "vst") || begins(text, "vse");
    free(text);
  }
  for (int class = 0; class < CLASSES; ++class)
    if (found[class])
      qemu_plugin_register_vcpu_tb_exec_inline(block, ADD, &counts[class], found[class]);
}

static void report(Id id, void *unused) {
  (void)id, (void)unused;
  fprintf(stderr,
          "{\"all\": %" PRIu64 ", \"fma\": %" PRIu64 ", \"loads\": %" PRIu64
          ", \"stores\": %" PRIu64 "}\n",
          counts[ALL], counts[FMA], counts[LOADS], counts[STORES]);
}

EXPORT int qemu_plugin_install(Id id, const void *info, int argc, char **argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, report, NULL);
  return 0;
}
