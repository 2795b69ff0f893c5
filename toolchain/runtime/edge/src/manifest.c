/* bundle.json: what a bundle is and what it needs. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* glibc's own; absent with another C library. */
extern const char *gnu_get_libc_version(void) __attribute__((weak));

int32_t tcr_check_schema(const json_value *data, const char *where, tcr_problem *problem) {
  const json_value *schema = json_get(data, "schema");
  if (!json_is(schema, JSON_NUMBER) || schema->whole < 1)
    return tcr_damaged(problem, where, "schema must be a number from 1 to %d", TCR_SCHEMA);
  if (schema->whole > TCR_SCHEMA)
    return tcr_fail(problem, TC_INCOMPATIBLE_HOST, where, "use the runtime of the toolchain that made it",
                    "is made for schema %lld, this runtime understands up to %d", (long long)schema->whole, TCR_SCHEMA);
  return TC_OK;
}

static bool strings(const json_value *list) {
  if (!json_is(list, JSON_LIST)) return false;
  for (const json_value *item = list->as.first; item; item = item->next)
    if (item->kind != JSON_STRING) return false;
  return true;
}

static bool null_or(const json_value *value, json_kind kind) {
  return value == NULL || value->kind == JSON_NULL || value->kind == kind;
}

static int32_t check_requirements(const json_value *data, const char *where, tcr_problem *problem) {
  const json_value *libc = json_get(data, "libc");
  if (json_text(json_get(data, "os")) == NULL || json_text(json_get(data, "arch")) == NULL ||
      !strings(json_get(data, "cpu_features")) || !null_or(json_get(data, "cuda_arch"), JSON_STRING) ||
      !null_or(libc, JSON_OBJECT) ||
      (json_is(libc, JSON_OBJECT) &&
       (json_text(json_get(libc, "name")) == NULL || json_text(json_get(libc, "min")) == NULL)))
    return tcr_damaged(problem, where,
                       "'requirements' must hold os, arch, cpu_features, and perhaps libc and cuda_arch");
  return TC_OK;
}

static int32_t parse_variant(tcr_variant *variant, const tcr_contract *contract, const json_value *entry,
                             const char *where, tcr_problem *problem) {
  const json_value *sizes = json_get(entry, "sizes");
  variant->file = json_text(json_get(entry, "file"));
  if (variant->file == NULL || !(sizes == NULL || json_is(sizes, JSON_OBJECT)))
    return tcr_damaged(problem, where, "an engine variant must be an object with file and sizes");
  for (const json_value *size = sizes == NULL ? NULL : sizes->as.first; size; size = size->next) {
    uint32_t dim = 0;
    while (dim < contract->num_dims && strcmp(contract->dims[dim].name, size->key) != 0) dim++;
    if (dim == contract->num_dims)
      return tcr_damaged(problem, where, "%s has a size for '%s', no dim of the contract", variant->file, size->key);
    if (!size->integer || size->whole < 1)
      return tcr_damaged(problem, where, "the sizes of engine variant %s must be whole numbers from 1", variant->file);
    variant->sizes[dim] = size->whole;
  }
  return TC_OK;
}

static int32_t parse_engine(tcr_manifest *manifest, const json_value *engine, const char *where, tcr_problem *problem) {
  const json_value *list = json_get(engine, "variants");
  uint32_t dims = manifest->contract.num_dims + 1, index = 0;
  manifest->backend = json_text(json_get(engine, "backend"));
  manifest->precision = json_text(json_get(engine, "precision"));
  manifest->device = json_text(json_get(engine, "device"));
  if (manifest->backend == NULL || manifest->precision == NULL || manifest->device == NULL)
    return tcr_damaged(problem, where, "'engine' must hold backend, precision, device and variants");
  if (!json_is(list, JSON_LIST) || list->count == 0 || list->count > 4096)
    return tcr_damaged(problem, where, "engine variants must be a list with 1 to 4096 entries");
  manifest->variants = calloc(list->count, sizeof *manifest->variants);
  manifest->sizes = calloc((size_t)list->count * dims, sizeof *manifest->sizes);
  if (manifest->variants == NULL || manifest->sizes == NULL)
    return tcr_no_memory(problem, list->count * sizeof *manifest->variants, "the engine's variants");
  manifest->num_variants = list->count;
  for (const json_value *entry = list->as.first; entry; entry = entry->next, index++) {
    manifest->variants[index].sizes = manifest->sizes + (size_t)index * dims;
    int32_t status = parse_variant(&manifest->variants[index], &manifest->contract, entry, where, problem);
    if (status != TC_OK) return status;
  }
  return TC_OK;
}

static int32_t parse_tolerance(tcr_manifest *manifest, const json_value *data, const char *where,
                               tcr_problem *problem) {
  const json_value *cosine = json_get(data, "cosine"), *error = json_get(data, "max_abs_error");
  manifest->cosine = manifest->max_abs_error = NAN;
  if (!null_or(data, JSON_OBJECT) || !null_or(cosine, JSON_NUMBER) || !null_or(error, JSON_NUMBER))
    return tcr_damaged(problem, where, "selftest must hold the numbers cosine and max_abs_error, or null");
  if (json_is(cosine, JSON_NUMBER)) manifest->cosine = cosine->as.number;
  if (json_is(error, JSON_NUMBER)) manifest->max_abs_error = error->as.number;
  manifest->has_tolerance = json_is(cosine, JSON_NUMBER) || json_is(error, JSON_NUMBER);
  return TC_OK;
}

static int32_t parse_root(tcr_manifest *manifest, const json_value *root, const char *where, tcr_problem *problem) {
  const json_value *target = json_get(root, "target");
  int32_t status = tcr_check_schema(root, where, problem);
  if (status != TC_OK) return status;
  manifest->name = json_text(json_get(root, "name"));
  manifest->version = json_text(json_get(root, "version"));
  manifest->description = json_text(json_get(root, "description"));
  manifest->target = json_text(json_get(target, "name"));
  manifest->profile = json_get(target, "profile");
  manifest->requirements = json_get(root, "requirements");
  if (manifest->name == NULL || manifest->version == NULL || manifest->description == NULL || manifest->target == NULL)
    return tcr_damaged(problem, where, "name, version, description and target must be given");
  status = check_requirements(manifest->requirements, where, problem);
  if (status == TC_OK) status = tcr_parse_contract(&manifest->contract, json_get(root, "contract"), where, problem);
  if (status == TC_OK) status = parse_engine(manifest, json_get(root, "engine"), where, problem);
  if (status == TC_OK) status = parse_tolerance(manifest, json_get(root, "selftest"), where, problem);
  return status;
}

int32_t tcr_parse_manifest(tcr_manifest *manifest, const char *text, size_t bytes, const char *where,
                           tcr_problem *problem) {
  size_t offset;
  memset(manifest, 0, sizeof *manifest);
  const char *wrong = json_parse(&manifest->document, text, bytes, &offset);
  if (wrong == json_no_memory) return tcr_no_memory(problem, bytes, where);
  if (wrong != NULL) return tcr_damaged(problem, where, "is not JSON (%s at byte %zu)", wrong, offset);
  if (!json_is(manifest->document.root, JSON_OBJECT)) return tcr_damaged(problem, where, "is not a JSON object");
  return parse_root(manifest, manifest->document.root, where, problem);
}

void tcr_free_manifest(tcr_manifest *manifest) {
  tcr_free_contract(&manifest->contract);
  free(manifest->variants);
  free(manifest->sizes);
  json_free(&manifest->document);
  memset(manifest, 0, sizeof *manifest);
}

static bool older(const char *have, const char *need) {
  unsigned have_major = 0, have_minor = 0, need_major = 0, need_minor = 0;
  sscanf(have, "%u.%u", &have_major, &have_minor);
  sscanf(need, "%u.%u", &need_major, &need_minor);
  return have_major < need_major || (have_major == need_major && have_minor < need_minor);
}

static int libc_problem(const json_value *libc, tcr_text *text) {
  const char *name = json_text(json_get(libc, "name")), *need = json_text(json_get(libc, "min"));
  if (name == NULL || need == NULL || strcmp(name, "glibc") != 0) return 0;
  if (gnu_get_libc_version == NULL) {
    tcr_append(text, "\n  needs glibc %s or newer, this program has another C library", need);
    return 1;
  }
  if (!older(gnu_get_libc_version(), need)) return 0;
  tcr_append(text, "\n  needs glibc %s or newer, this machine has %s", need, gnu_get_libc_version());
  return 1;
}

int tcr_incompatibilities(const json_value *requirements, bool linked, tcr_text *text) {
  const char *os = json_text(json_get(requirements, "os")), *arch = json_text(json_get(requirements, "arch"));
  const char *cuda = json_text(json_get(requirements, "cuda_arch"));
  const json_value *features = json_get(requirements, "cpu_features");
  int found = 0, missing = 0;
  if (strcmp(os, tcr_host_os()) != 0) {
    tcr_append(text, "\n  needs operating system %s, this machine runs %s", os, tcr_host_os());
    found++;
  }
  if (!tcr_is_host_arch(arch)) {
    tcr_append(text, "\n  needs a processor of architecture %s, this machine is %s", arch, tcr_host_arch());
    return found + 1;
  }
  for (const json_value *feature = features->as.first; feature; feature = feature->next)
    if (!tcr_host_has(feature->as.text))
      tcr_append(text, "%s%s", missing++ ? ", " : "\n  needs CPU features ", feature->as.text);
  if (missing) {
    char machine[64];
    tcr_host_describe(machine, sizeof machine);
    tcr_append(text, ", which this machine (%s) lacks", machine);
    found++;
  }
  if (!linked) found += libc_problem(json_get(requirements, "libc"), text);
  if (cuda != NULL) {
    tcr_append(text, "\n  needs a CUDA device of architecture %s, this runtime uses the processor alone", cuda);
    found++;
  }
  return found;
}
