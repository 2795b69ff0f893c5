/* Refuses libraries that the dynamic loader would refuse with few words, or crash on. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "internal.h"

static uint64_t little(const unsigned char *at, int bytes) {
  uint64_t value = 0;
  while (bytes--) value = value << 8 | at[bytes];
  return value;
}

/* The offsets are those of Elf32_Ehdr and Elf64_Ehdr (System V gABI, "ELF Header"). */
int32_t tcr_check_library(const char *path, const char *name, tcr_problem *problem) {
  unsigned char head[64] = {0};
  int handle = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t got = handle < 0 ? -1 : read(handle, head, sizeof head);
  off_t end = handle < 0 ? 0 : lseek(handle, 0, SEEK_END);
  if (handle >= 0) close(handle);
  int bits = head[4] == 2 ? 64 : 32, machine = (int)little(head + 18, 2);
  if (got < 52 || memcmp(head, "\177ELF", 4) != 0 || head[5] != 1 || head[4] < 1 || head[4] > 2 ||
      little(head + 16, 2) != 3)
    return tcr_damaged(problem, name, "is not a shared library (little-endian ELF)");
  if (machine != tcr_host_elf_machine() || bits != (int)(8 * sizeof(void *)))
    return tcr_fail(problem, TC_INCOMPATIBLE_HOST, name, "build the bundle for this machine",
                    "is compiled for %s (%d bits), this machine is %s (%d bits)", tcr_elf_machine_name(machine), bits,
                    tcr_host_arch(), (int)(8 * sizeof(void *)));
  uint64_t sections = bits == 64 ? little(head + 40, 8) : little(head + 32, 4);
  uint64_t size = little(head + (bits == 64 ? 58 : 46), 2) * little(head + (bits == 64 ? 60 : 48), 2);
  if (sections > (uint64_t)end || sections + size > (uint64_t)end)
    return tcr_damaged(problem, name, "is truncated: it has %lld bytes, at least %llu are needed", (long long)end,
                       (unsigned long long)(sections + size));
  return TC_OK;
}
