/* Extensions of RISC-V with names of several letters: AT_HWCAP tells of single letters alone. */
#include <stdio.h>
#include <string.h>

#include "internal.h"

#if defined(__riscv) && defined(__linux__)

/* Whether an isa string, "rv64imafdc_zicsr_zba", has the extension, which stands after an underscore. */
static bool lists(const char *isa, const char *extension) {
  size_t length = strlen(extension);
  for (const char *at = strchr(isa, '_'); at != NULL; at = strchr(at + 1, '_'))
    if (strncmp(at + 1, extension, length) == 0 && strchr("_ \t\n", at[1 + length]) != NULL) return true;
  return false;
}

/* Every core's line "isa" of /proc/cpuinfo (Documentation/arch/riscv/uabi.rst). */
bool tcr_riscv_has(const char *extension) {
  char line[4096];
  bool found = false, all = true;
  FILE *file = fopen("/proc/cpuinfo", "re");
  while (file != NULL && fgets(line, sizeof line, file) != NULL) {
    if (strncmp(line, "isa", 3) != 0 || strspn(line + 3, " \t:") == 0) continue;
    found = true;
    all = all && lists(line, extension);
  }
  if (file != NULL) fclose(file);
  return found && all;
}

#else
bool tcr_riscv_has(const char *extension) { return extension == NULL; } /* no such machine */
#endif
