/* The interface: opens and closes bundles, describes them, guards runs and error texts with locks. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

uint32_t tc_runtime_abi(void) { return TC_RUNTIME_ABI; }

static void free_bundle(tc_bundle *bundle) {
  for (uint32_t i = 0; bundle->engines != NULL && i < bundle->num_variants; i++) tcr_engine_close(bundle, i);
  free(bundle->engines);
  free(bundle->own_sizes);
  free(bundle->dims);
  free(bundle->given);
  free(bundle->taken);
  tcr_free_contract(&bundle->own_contract);
  tcr_free_manifest(&bundle->manifest);
  if (bundle->in_layout) tcr_free_layout(&bundle->layout);
  if (bundle->locks) {
    pthread_mutex_destroy(&bundle->running);
    pthread_mutex_destroy(&bundle->speaking);
  }
  free(bundle);
}

void tc_close(tc_bundle *bundle) {
  if (bundle != NULL) free_bundle(bundle);
}

/* Which kind of engine it is: engine.json says it, where it is no virtual machine's. */
static int32_t check_engine(tc_bundle *bundle, tcr_problem *problem) {
  const tcr_manifest *manifest = &bundle->manifest;
  const tcr_file *file = tcr_find_file(&bundle->layout, "engine.json");
  json_document document;
  tcr_bytes bytes;
  size_t offset;
  if (file == NULL) return tcr_damaged(problem, bundle->layout.path, "the bundle has no engine.json");
  int32_t status = tcr_read_blob(bundle->layout.path, file->digest, file->size, JSON_MAX_BYTES, &bytes, problem);
  if (status != TC_OK) return status;
  const char *wrong = json_parse(&document, (const char *)bytes.data, bytes.size, &offset);
  free(bytes.data);
  if (wrong == json_no_memory) return tcr_no_memory(problem, file->size, "engine.json");
  if (wrong != NULL) return tcr_damaged(problem, "engine.json", "is not JSON (%s at byte %zu)", wrong, offset);
  status = tcr_check_schema(document.root, "engine.json", problem);
  const char *form = json_text(json_get(document.root, "form"));
  bool aot = form != NULL && strcmp(form, "aot") == 0;
  if (status == TC_OK && (strcmp(manifest->backend, "tvm") != 0 || strcmp(manifest->device, "cpu") != 0 || !aot))
    status =
        tcr_fail(problem, TC_NO_ENGINE, bundle->layout.path,
                 "open it with toolchain.runtime in Python, or build it with engines ahead of time",
                 "the bundle for %.100s has an engine of backend %.100s, form %.100s, device %.100s; this runtime runs "
                 "backend tvm, form aot, device cpu",
                 manifest->target, manifest->backend, form == NULL ? "vm" : form, manifest->device);
  json_free(&document);
  bundle->form = "aot";
  return status;
}

static int32_t verify(tc_bundle *bundle, tcr_problem *problem) {
  char path[TCR_PATH];
  int32_t status = TC_OK;
  if (bundle->flags & TC_FLAG_VERIFY_ALL) return tcr_verify_all(&bundle->layout, problem);
  for (uint32_t i = 0; i < bundle->num_variants && status == TC_OK; i++) {
    const tcr_file *file = tcr_find_file(&bundle->layout, bundle->variants[i].file);
    status = tcr_blob_path(&bundle->layout, file->digest, path, problem);
    if (status == TC_OK) status = tcr_hash_file(path, file->name, file->size, file->digest, problem);
  }
  return status;
}

static int32_t check_host(tc_bundle *bundle, bool linked, const char *where, tcr_problem *problem) {
  char reasons[TCR_TEXT - 256] = "";
  tcr_text text = {reasons, sizeof reasons, 0};
  if (tcr_incompatibilities(bundle->manifest.requirements, linked, &text) == 0) return TC_OK;
  return tcr_fail(problem, TC_INCOMPATIBLE_HOST, where, "take the bundle of a target that suits this machine",
                  "the bundle for %.100s cannot run here:%s", bundle->manifest.target, reasons);
}

/* Memory for runs, the engines' places, and the first engine, or all. */
static int32_t prepare(tc_bundle *bundle, const tc_model *linked, tcr_problem *problem) {
  const tcr_contract *contract = bundle->contract;
  bundle->engines = calloc(bundle->num_variants, sizeof *bundle->engines);
  bundle->dims = calloc((size_t)contract->num_dims + 1, sizeof *bundle->dims);
  bundle->given = calloc((size_t)contract->num_inputs + 1, sizeof *bundle->given);
  bundle->taken = calloc((size_t)contract->num_outputs + 1, sizeof *bundle->taken);
  if (!bundle->engines || !bundle->dims || !bundle->given || !bundle->taken)
    return tcr_no_memory(problem, bundle->num_variants * sizeof *bundle->engines, "the engines");
  if (pthread_mutex_init(&bundle->running, NULL) != 0 || pthread_mutex_init(&bundle->speaking, NULL) != 0)
    return tcr_no_memory(problem, sizeof bundle->running, "a lock");
  bundle->locks = true;
  bundle->engines[0].model = linked;
  int32_t status = TC_OK;
  for (uint32_t i = 0; i < (bundle->flags & TC_FLAG_OPEN_ALL ? bundle->num_variants : 1) && status == TC_OK; i++)
    status = tcr_engine_open(bundle, i, problem);
  return status;
}

static int32_t open_path(tc_bundle *bundle, const char *path, const char *target, tcr_problem *problem) {
  int32_t status = tcr_open_layout(path, target, &bundle->layout, &bundle->manifest, problem);
  if (status != TC_OK) return status;
  bundle->in_layout = true;
  bundle->contract = &bundle->manifest.contract;
  bundle->variants = bundle->manifest.variants;
  bundle->num_variants = bundle->manifest.num_variants;
  status = check_host(bundle, false, path, problem);
  if (status == TC_OK) status = check_engine(bundle, problem);
  if (status == TC_OK) status = verify(bundle, problem);
  if (status == TC_OK) status = prepare(bundle, NULL, problem);
  return status;
}

static int32_t open_model(tc_bundle *bundle, const tc_model *model, const char *json, size_t bytes,
                          tcr_problem *problem) {
  int32_t status;
  bundle->form = "aot";
  if (json != NULL) {
    status = tcr_parse_manifest(&bundle->manifest, json, bytes, "bundle.json", problem);
    if (status != TC_OK) return status;
    if (bundle->manifest.num_variants != 1)
      return tcr_damaged(problem, "bundle.json", "has %u variants, one is linked", bundle->manifest.num_variants);
    bundle->contract = &bundle->manifest.contract;
    bundle->variants = bundle->manifest.variants;
    bundle->num_variants = 1;
    status = check_host(bundle, true, "bundle.json", problem);
    return status == TC_OK ? prepare(bundle, model, problem) : status;
  }
  status = tcr_contract_of_model(&bundle->own_contract, model, problem);
  if (status != TC_OK) return status;
  bundle->own_sizes = calloc((size_t)bundle->own_contract.num_dims + 1, sizeof *bundle->own_sizes);
  if (bundle->own_sizes == NULL) return tcr_no_memory(problem, bundle->own_contract.num_dims, "the engine's sizes");
  bundle->own_variant = (tcr_variant){"the linked engine", bundle->own_sizes};
  bundle->contract = &bundle->own_contract;
  bundle->variants = &bundle->own_variant;
  bundle->num_variants = 1;
  return prepare(bundle, model, problem);
}

/* What a caller of an older or newer version of the struct asks for. */
static int32_t take_options(const tc_options *given, tc_options *options, tcr_problem *problem) {
  const tc_options defaults = TC_OPTIONS;
  *options = defaults;
  if (given == NULL) return TC_OK;
  if (given->size < sizeof *options)
    return tcr_fail(problem, TC_USAGE, "options.size", "start from TC_OPTIONS", "got %u, at least %zu is needed",
                    given->size, sizeof *options);
  *options = *given;
  if (given->abi != TC_RUNTIME_ABI)
    return tcr_fail(problem, TC_USAGE, "options.abi", "compile the program against this runtime's header",
                    "the program was made for interface %u of the runtime, this is %u", given->abi, TC_RUNTIME_ABI);
  if (given->threads < 0)
    return tcr_fail(problem, TC_USAGE, "options.threads", "", "must be 0 (all) or more, got %d", given->threads);
  if (given->flags & ~(TC_FLAG_VERIFY_ALL | TC_FLAG_OPEN_ALL | TC_FLAG_WAIT))
    return tcr_fail(problem, TC_USAGE, "options.flags", "", "holds unknown flags: %#x", given->flags);
  return TC_OK;
}

static int32_t open_any(const char *path, const tc_model *model, const char *json, size_t bytes,
                        const tc_options *given, tc_bundle **result) {
  tcr_problem problem = {TC_OK, ""};
  tc_options options;
  tc_bundle *bundle = NULL;
  int32_t status = take_options(given, &options, &problem);
  if (result != NULL) *result = NULL;
  if (status == TC_OK && (result == NULL || (path == NULL && model == NULL)))
    status = tcr_fail(&problem, TC_USAGE, "arguments", "", "a path or model, and a place for the bundle must be given");
  if (status == TC_OK) {
    bundle = calloc(1, sizeof *bundle);
    if (bundle == NULL) status = tcr_no_memory(&problem, sizeof *bundle, "a bundle");
  }
  if (status == TC_OK) {
    bundle->flags = options.flags;
    bundle->threads = options.threads;
    status = path != NULL ? open_path(bundle, path, options.target, &problem)
                          : open_model(bundle, model, json, bytes, &problem);
  }
  if (status == TC_OK) {
    *result = bundle;
    return TC_OK;
  }
  if (bundle != NULL) free_bundle(bundle);
  if (given != NULL && given->size >= sizeof *given && given->error != NULL && given->error_bytes > 0)
    snprintf(given->error, given->error_bytes, "%s", problem.text);
  return status;
}

int32_t tc_open(const char *path, const tc_options *options, tc_bundle **bundle) {
  return open_any(path, NULL, NULL, 0, options, bundle);
}

int32_t tc_open_linked(const tc_model *model, const char *bundle_json, size_t bytes, const tc_options *options,
                       tc_bundle **bundle) {
  return open_any(NULL, model, bundle_json, bytes, options, bundle);
}

uint32_t tc_num_inputs(const tc_bundle *bundle) { return bundle == NULL ? 0 : bundle->contract->num_inputs; }
uint32_t tc_num_outputs(const tc_bundle *bundle) { return bundle == NULL ? 0 : bundle->contract->num_outputs; }
uint32_t tc_num_dims(const tc_bundle *bundle) { return bundle == NULL ? 0 : bundle->contract->num_dims; }

/* A thread's number; pthread_t may be a pointer or an integer. */
static uintptr_t this_thread(void) { return (uintptr_t)pthread_self(); }

/* Keeps the text of a failure for tc_last_error: one for each of the last few threads that failed. */
static int32_t remember(const tc_bundle *constant, const tcr_problem *problem, int32_t status) {
  tc_bundle *bundle = (tc_bundle *)(uintptr_t)constant;
  if (status == TC_OK || bundle == NULL) return status;
  pthread_mutex_lock(&bundle->speaking);
  uint32_t slot = 0;
  while (slot < TCR_ERRORS && !(bundle->errors[slot].used && bundle->errors[slot].thread == this_thread())) slot++;
  if (slot == TCR_ERRORS) slot = bundle->next_error++ % TCR_ERRORS;
  bundle->errors[slot].used = true;
  bundle->errors[slot].thread = this_thread();
  memcpy(bundle->errors[slot].text, problem->text, sizeof problem->text);
  pthread_mutex_unlock(&bundle->speaking);
  return status;
}

size_t tc_last_error(tc_bundle *bundle, char *text, size_t bytes) {
  size_t length = 0;
  if (text != NULL && bytes > 0) text[0] = 0;
  if (bundle == NULL) return 0;
  pthread_mutex_lock(&bundle->speaking);
  for (uint32_t i = 0; i < TCR_ERRORS; i++) {
    if (!bundle->errors[i].used || bundle->errors[i].thread != this_thread()) continue;
    length = strlen(bundle->errors[i].text);
    if (text != NULL && bytes > 0) snprintf(text, bytes, "%s", bundle->errors[i].text);
  }
  pthread_mutex_unlock(&bundle->speaking);
  return length;
}

static int32_t bad_index(const tc_bundle *bundle, uint32_t index, uint32_t count) {
  tcr_problem problem = {TC_OK, ""};
  tcr_fail(&problem, TC_USAGE, "arguments", "",
           "number %u is asked for, there are %u, or the size of the struct is not set", index, count);
  return remember(bundle, &problem, TC_USAGE);
}

static int32_t describe(const tc_bundle *bundle, const tcr_tensor *specs, uint32_t count, uint32_t index,
                        tc_tensor_info *info) {
  if (bundle == NULL || info == NULL || info->size < sizeof *info || index >= count)
    return bad_index(bundle, index, count);
  info->dtype = specs[index].dtype;
  info->rank = specs[index].rank;
  info->name = specs[index].name;
  info->shape = specs[index].shape;
  return TC_OK;
}

int32_t tc_input(const tc_bundle *bundle, uint32_t index, tc_tensor_info *info) {
  return describe(bundle, bundle == NULL ? NULL : bundle->contract->inputs, tc_num_inputs(bundle), index, info);
}

int32_t tc_output(const tc_bundle *bundle, uint32_t index, tc_tensor_info *info) {
  return describe(bundle, bundle == NULL ? NULL : bundle->contract->outputs, tc_num_outputs(bundle), index, info);
}

int32_t tc_dim_at(const tc_bundle *bundle, uint32_t index, tc_dim_info *info) {
  if (bundle == NULL || info == NULL || info->size < sizeof *info || index >= bundle->contract->num_dims)
    return bad_index(bundle, index, tc_num_dims(bundle));
  const tcr_dim *dim = &bundle->contract->dims[index];
  *info = (tc_dim_info){info->size, dim->batch, dim->name, dim->min, dim->max};
  return TC_OK;
}

const char *tc_property(const tc_bundle *bundle, const char *key) {
  if (bundle == NULL || key == NULL) return NULL;
  const tcr_manifest *manifest = &bundle->manifest;
  const struct {
    const char *key, *value;
  } all[] = {
      {"name", manifest->name},     {"version", manifest->version},     {"description", manifest->description},
      {"target", manifest->target}, {"precision", manifest->precision}, {"backend", manifest->backend},
      {"form", bundle->form},       {"digest", bundle->layout.digest},
  };
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    if (strcmp(all[i].key, key) == 0) return all[i].value == NULL ? "" : all[i].value;
  return NULL;
}

/* Takes the bundle for this thread. */
static int32_t enter(tc_bundle *bundle, tcr_problem *problem) {
  if (bundle == NULL) return TC_USAGE;
  if (bundle->flags & TC_FLAG_WAIT)
    pthread_mutex_lock(&bundle->running);
  else if (pthread_mutex_trylock(&bundle->running) != 0)
    return tcr_fail(problem, TC_BUSY, "bundle", "open it once for each thread, or with TC_FLAG_WAIT",
                    "another thread is running it");
  return TC_OK;
}

static int32_t run(tc_bundle *bundle, const tc_value *inputs, uint32_t num_inputs, tc_value *outputs,
                   uint32_t num_outputs, bool execute) {
  tcr_problem problem = {TC_OK, ""};
  int32_t status = enter(bundle, &problem);
  if (status != TC_OK) return remember(bundle, &problem, status);
  status = tcr_run_values(bundle, inputs, num_inputs, outputs, num_outputs, execute, &problem);
  pthread_mutex_unlock(&bundle->running);
  return remember(bundle, &problem, status);
}

int32_t tc_output_shapes(tc_bundle *bundle, const tc_value *inputs, uint32_t num_inputs, tc_value *outputs,
                         uint32_t num_outputs) {
  return run(bundle, inputs, num_inputs, outputs, num_outputs, false);
}

int32_t tc_run(tc_bundle *bundle, const tc_value *inputs, uint32_t num_inputs, tc_value *outputs,
               uint32_t num_outputs) {
  return run(bundle, inputs, num_inputs, outputs, num_outputs, true);
}

int32_t tc_self_test(tc_bundle *bundle, tc_output_check *checks, uint32_t num_checks) {
  tcr_problem problem = {TC_OK, ""};
  int32_t status = enter(bundle, &problem);
  if (status != TC_OK) return remember(bundle, &problem, status);
  status = tcr_self_test(bundle, checks, num_checks, &problem);
  pthread_mutex_unlock(&bundle->running);
  return remember(bundle, &problem, status);
}
