/* The machine that a WebAssembly module runs on: host.c's part for wasm32-wasi. */
#include <stdio.h>
#include <string.h>

#include "internal.h"

const char *tcr_host_os(void) { return "wasi"; }
const char *tcr_host_arch(void) { return "wasm32"; }
bool tcr_is_host_arch(const char *name) { return strcmp(name, "wasm32") == 0; }
int tcr_host_elf_machine(void) { return -1; } /* modules load no libraries */
const char *tcr_elf_machine_name(int machine) { return machine < 0 ? "wasm32" : "another architecture"; }

/* An engine refuses a module with instructions that it lacks before any of them runs; nothing can be asked in here. */
bool tcr_host_has(const char *feature) {
  (void)feature;
  return true;
}

void tcr_host_describe(char *text, size_t bytes) { snprintf(text, bytes, "wasm32"); }
const char *tcr_host_processor(void) { return ""; }
