/* For whoever embeds a WebAssembly module instead of running it as a command: opens the model inside. */
#include <string.h>

#include "internal.h"

extern const char toolchain_bundle_json[];
extern const size_t toolchain_bundle_json_bytes;
extern const char toolchain_selftest[];
extern const size_t toolchain_selftest_bytes;
void __wasm_call_ctors(void);

/* As _start does it; a module is either run or embedded. */
static void start_once(void) {
  static bool started;
  if (!started) __wasm_call_ctors();
  started = true;
}

int32_t tc_open_module(const tc_options *given, tc_bundle **bundle) {
  tc_options options = TC_OPTIONS;
  start_once();
  if (given != NULL) {
    memcpy(&options, given, given->size < sizeof options ? given->size : sizeof options);
    if (given->size >= offsetof(tc_options, selftest)) options.size = sizeof options;
  }
  options.selftest = toolchain_selftest_bytes ? toolchain_selftest : NULL;
  options.selftest_bytes = toolchain_selftest_bytes;
  return tc_open_linked(toolchain_model(), toolchain_bundle_json, toolchain_bundle_json_bytes, &options, bundle);
}
