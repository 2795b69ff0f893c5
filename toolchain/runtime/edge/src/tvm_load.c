/* TVM's run-time: its two libraries come with a bundle whose engine needs them, and stay for the life of the process,
 * as they start threads and register functions that cannot be taken back. */
#include <dlfcn.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tvm_api.h"

static const char *const libraries[] = {"runtime/libtvm_ffi.so", "runtime/libtvm_runtime.so"};
enum { LIBRARIES = sizeof libraries / sizeof *libraries };

static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;
static char loaded[LIBRARIES][TCR_DIGEST + 1]; /* digests of what is loaded */
static bool complete;
static tvm_api api;

static bool symbol(void *library, const char *name, void *function) {
  void *found = dlsym(library, name);
  memcpy(function, &found, sizeof found); /* what POSIX asks for in place of a cast */
  return found != NULL;
}

static int32_t bind(void *ffi, const char *name, tcr_problem *problem) {
  if (symbol(ffi, "TVMFFIFunctionGetGlobal", &api.global) && symbol(ffi, "TVMFFIFunctionCall", &api.call) &&
      symbol(ffi, "TVMFFIObjectDecRef", &api.release) && symbol(ffi, "TVMFFIErrorMoveFromRaised", &api.error) &&
      symbol(ffi, "TVMFFITensorFromDLPack", &api.tensor) && symbol(ffi, "TVMFFIFunctionCreate", &api.make) &&
      symbol(ffi, "TVMFFIFunctionSetGlobal", &api.set) && symbol(ffi, "TVMFFIErrorSetRaisedFromCStr", &api.raise))
    return TC_OK;
  return tcr_damaged(problem, name, "lacks functions of TVM's interface");
}

int32_t tcr_tvm_processors(void) {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
}

/* What TVM asks the environment at its first run: as many threads as a run may use, none bound to a processor. */
static void set_environment(int32_t threads) {
  const int32_t processors = tcr_tvm_processors();
  char count[16];
  snprintf(count, sizeof count, "%d", threads > processors ? threads : processors);
  setenv("TVM_NUM_THREADS", count, 0);
  setenv("TVM_BIND_THREADS", "0", 0);
}

static int32_t load_one(const tcr_layout *layout, int index, void **handle, tcr_problem *problem) {
  const tcr_file *file = tcr_find_file(layout, libraries[index]);
  char path[TCR_PATH];
  int32_t status = tcr_blob_path(layout, file->digest, path, problem);
  if (status == TC_OK) status = tcr_hash_file(path, file->name, file->size, file->digest, problem);
  if (status == TC_OK) status = tcr_check_library(path, file->name, problem);
  if (status != TC_OK) return status;
  /* Global, since engines and the second library find the first one's functions by name. */
  *handle = dlopen(path, RTLD_NOW | RTLD_GLOBAL | RTLD_NODELETE);
  if (*handle == NULL) {
    const char *reason = dlerror();
    return tcr_fail(problem, TC_INCOMPATIBLE_HOST, file->name, "TVM's run-time needs libstdc++.so.6 on the machine",
                    "cannot be loaded: %s", reason == NULL ? "?" : reason);
  }
  memcpy(loaded[index], file->digest, strlen(file->digest) + 1);
  return TC_OK;
}

static int32_t load_all(const tcr_layout *layout, int32_t threads, tcr_problem *problem) {
  void *handle = NULL;
  char why[256];
  if (!loaded[0][0] && dlopen("libtvm_ffi.so", RTLD_NOW | RTLD_NOLOAD) != NULL)
    return tcr_fail(problem, TC_NO_ENGINE, "engine", "open the bundle in a process of its own",
                    "this process holds another TVM already");
  set_environment(threads);
  int32_t status = load_one(layout, 0, &handle, problem);
  if (status == TC_OK) status = bind(handle, libraries[0], problem);
  if (status == TC_OK) status = load_one(layout, 1, &handle, problem);
  if (status == TC_OK && !tcr_tvm_register(why, sizeof why))
    status = tcr_fail(problem, TC_FAILED, "engine", "", "TVM takes no functions: %s", why);
  complete = status == TC_OK;
  return status;
}

const tvm_api *tcr_tvm_api(void) { return &api; }

int32_t tcr_tvm_load(const tcr_layout *layout, int32_t threads, tcr_problem *problem) {
  int32_t status = TC_OK;
  for (int i = 0; i < LIBRARIES; i++)
    if (tcr_find_file(layout, libraries[i]) == NULL)
      return tcr_fail(problem, TC_NO_ENGINE, libraries[i],
                      "open it with toolchain.runtime in Python, or build it with engines ahead of time",
                      "the bundle does not carry TVM's run-time, which its engine needs");
  pthread_mutex_lock(&loading);
  for (int i = 0; i < LIBRARIES && status == TC_OK; i++)
    if (loaded[i][0] && strcmp(loaded[i], tcr_find_file(layout, libraries[i])->digest) != 0)
      status = tcr_fail(problem, TC_NO_ENGINE, libraries[i], "open the bundle in a process of its own",
                        "this process holds another version of it, of another bundle");
  if (status == TC_OK && !complete) status = load_all(layout, threads, problem);
  pthread_mutex_unlock(&loading);
  return status;
}

/* The raised error's text: its first line. */
void tcr_tvm_reason(char *text, size_t bytes) {
  void *raised = NULL;
  api.error(&raised);
  if (raised == NULL) {
    snprintf(text, bytes, "no reason given");
    return;
  }
  tvm_error error;
  memcpy(&error, raised, sizeof error);
  const char *end = memchr(error.message.data, '\n', error.message.size);
  const size_t length = end == NULL ? error.message.size : (size_t)(end - error.message.data);
  snprintf(text, bytes, "%.*s", (int)(length < 400 ? length : 400), error.message.data);
  api.release(raised);
}

static bool fail(char *text, size_t bytes, bool failed) {
  if (failed) tcr_tvm_reason(text, bytes);
  return !failed;
}

bool tcr_tvm_global(const char *name, void **function, char *text, size_t bytes) {
  const tvm_bytes key = {name, strlen(name)};
  *function = NULL;
  if (!fail(text, bytes, api.global(&key, function) != 0)) return false;
  if (*function == NULL) snprintf(text, bytes, "there is no function %s", name);
  return *function != NULL;
}

bool tcr_tvm_call(void *function, tvm_any *arguments, int32_t count, tvm_any *result, char *text, size_t bytes) {
  memset(result, 0, sizeof *result);
  return fail(text, bytes, api.call(function, arguments, count, result) != 0);
}

bool tcr_tvm_call_global(const char *name, tvm_any *arguments, int32_t count, tvm_any *result, char *text,
                         size_t bytes) {
  void *function;
  if (!tcr_tvm_global(name, &function, text, bytes)) return false;
  const bool good = tcr_tvm_call(function, arguments, count, result, text, bytes);
  api.release(function);
  return good;
}

void tcr_tvm_drop(tvm_any *value) {
  if (value->type >= TVM_OBJECT && value->as.object != NULL) api.release(value->as.object);
  memset(value, 0, sizeof *value);
}
