/* Opens and closes bundles. */
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

/* Which form of engine it is: engine.json says it; none: TVM's virtual machine, or not TVM. */
static int32_t read_form(tc_bundle *bundle, tcr_problem *problem) {
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
  bundle->form = json_text_is(document.root, "form", "aot")      ? "aot"
                 : json_text_is(document.root, "form", "static") ? "static"
                 : strcmp(bundle->manifest.backend, "tvm") == 0 ? "vm"
                                                                 : "";
  json_free(&document);
  return status;
}

static int32_t check_engine(tc_bundle *bundle, tcr_problem *problem) {
  const tcr_manifest *manifest = &bundle->manifest;
  int32_t status = read_form(bundle, problem);
  if (status != TC_OK) return status;
  const bool known = strcmp(bundle->form, "aot") == 0 || strcmp(bundle->form, "vm") == 0;
  if (strcmp(manifest->backend, "tvm") == 0 && strcmp(manifest->device, "cpu") == 0 && known) return TC_OK;
  return tcr_fail(problem, TC_NO_ENGINE, bundle->layout.path,
                  strcmp(bundle->form, "static") == 0
                      ? "its engine is an executable, 'model': run that (toolchain export edge writes it to a folder)"
                      : "open it with toolchain.runtime in Python, or build it with engines ahead of time",
                  "the bundle for %.100s has an engine of backend %.100s, form %s, device %.100s; this runtime runs "
                  "backend tvm, forms aot and vm, device cpu",
                  manifest->target, manifest->backend, bundle->form[0] ? bundle->form : "-", manifest->device);
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

static uint32_t engines_at_once(const tc_bundle *bundle) {
  if (bundle->flags & TC_FLAG_DESCRIBE) return 0;
  return bundle->flags & TC_FLAG_OPEN_ALL ? bundle->num_variants : 1;
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
  for (uint32_t i = 0; i < engines_at_once(bundle) && status == TC_OK; i++)
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
  if (bundle->flags & TC_FLAG_DESCRIBE) {
    status = read_form(bundle, problem);
    return status == TC_OK ? prepare(bundle, NULL, problem) : status;
  }
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

/* Size of the struct in its first version. */
#define FIRST_OPTIONS offsetof(tc_options, selftest)

/* What a caller of an older or newer version of the struct asks for. */
static int32_t take_options(const tc_options *given, tc_options *options, tcr_problem *problem) {
  const tc_options defaults = TC_OPTIONS;
  *options = defaults;
  if (given == NULL) return TC_OK;
  if (given->size < FIRST_OPTIONS)
    return tcr_fail(problem, TC_USAGE, "options.size", "start from TC_OPTIONS", "got %u, at least %zu is needed",
                    given->size, FIRST_OPTIONS);
  memcpy(options, given, given->size < sizeof *options ? given->size : sizeof *options);
  if (given->abi != TC_RUNTIME_ABI)
    return tcr_fail(problem, TC_USAGE, "options.abi", "compile the program against this runtime's header",
                    "the program was made for interface %u of the runtime, this is %u", given->abi, TC_RUNTIME_ABI);
  if (given->threads < 0)
    return tcr_fail(problem, TC_USAGE, "options.threads", "", "must be 0 (all) or more, got %d", given->threads);
  if (given->flags & ~(TC_FLAG_VERIFY_ALL | TC_FLAG_OPEN_ALL | TC_FLAG_WAIT | TC_FLAG_DESCRIBE))
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
    bundle->selftest = options.selftest;
    bundle->selftest_bytes = options.selftest_bytes;
    status = path != NULL ? open_path(bundle, path, options.target, &problem)
                          : open_model(bundle, model, json, bytes, &problem);
  }
  if (status == TC_OK) {
    *result = bundle;
    return TC_OK;
  }
  if (bundle != NULL) free_bundle(bundle);
  if (given != NULL && given->size >= FIRST_OPTIONS && given->error != NULL && given->error_bytes > 0)
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
