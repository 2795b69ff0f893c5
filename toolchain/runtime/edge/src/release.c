/* Which bundle of a release is meant: by its target, or the one that suits this machine best. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "internal.h"

static bool subset(const json_value *few, const json_value *many) {
  for (const json_value *a = few->as.first; a; a = a->next) {
    const json_value *b = many->as.first;
    while (b && strcmp(a->as.text, b->as.text) != 0) b = b->next;
    if (b == NULL) return false;
  }
  return true;
}

static bool for_this_processor(const tcr_manifest *manifest) {
  const char *name = tcr_host_processor();
  return *name && json_text_is(json_get(manifest->profile, "cpu"), "model", name);
}

/* Whether one suits this machine better than another that suits it too, as toolchain/bundle/resolve.py has it. */
static bool better(const tcr_manifest *one, const tcr_manifest *other) {
  const json_value *mine = json_get(one->requirements, "cpu_features"),
                   *its = json_get(other->requirements, "cpu_features");
  bool exact = for_this_processor(one), other_exact = for_this_processor(other);
  if (exact != other_exact) return exact;
  return subset(its, mine) && !subset(mine, its);
}

typedef struct candidate {
  tcr_layout layout;
  tcr_manifest manifest;
  bool able;
} candidate;

/* The first of those that no other one is better than. */
static int32_t choose(candidate *all, uint32_t count, const char *folder, uint32_t *best, tcr_problem *problem) {
  char reasons[TCR_TEXT - 256] = "";
  tcr_text text = {reasons, sizeof reasons, 0};
  *best = count;
  for (uint32_t i = 0; i < count; i++) {
    if (count > 1) tcr_append(&text, "\n  %s:", all[i].manifest.target);
    all[i].able = tcr_incompatibilities(all[i].manifest.requirements, false, &text) == 0;
  }
  if (count == 1) *best = 0; /* refused later, with its reasons, if this machine cannot run it */
  for (uint32_t i = 0; i < count && *best == count; i++) {
    bool beaten = !all[i].able;
    for (uint32_t j = 0; j < count && !beaten; j++) beaten = all[j].able && better(&all[j].manifest, &all[i].manifest);
    if (!beaten) *best = i;
  }
  if (*best < count) return TC_OK;
  return tcr_fail(problem, TC_INCOMPATIBLE_HOST, folder, "build the release for a target that suits this machine",
                  "this machine can run none of its bundles%s", reasons);
}

static int32_t open_best(const char *folder, const json_value *manifests, tcr_layout *layout, tcr_manifest *manifest,
                         tcr_problem *problem) {
  candidate *all = calloc(manifests->count, sizeof *all);
  uint32_t count = 0, best = manifests->count;
  int32_t status = all == NULL ? tcr_no_memory(problem, manifests->count * sizeof *all, "the release's index") : TC_OK;
  for (const json_value *entry = manifests->as.first; entry && status == TC_OK; entry = entry->next) {
    status = tcr_open_bundle(folder, entry, &all[count].layout, &all[count].manifest, problem);
    for (uint32_t i = 0; i < count && status == TC_OK; i++)
      if (strcmp(all[i].manifest.target, all[count].manifest.target) == 0)
        status = tcr_damaged(problem, folder, "two bundles are for the same target: %s", all[i].manifest.target);
    if (all[count].layout.path != NULL) count++;
  }
  if (status == TC_OK) status = choose(all, count, folder, &best, problem);
  for (uint32_t i = 0; i < count; i++) {
    if (status == TC_OK && i == best) {
      *layout = all[i].layout;
      *manifest = all[i].manifest;
      continue;
    }
    tcr_free_manifest(&all[i].manifest);
    tcr_free_layout(&all[i].layout);
  }
  free(all);
  return status;
}

static int32_t open_named(const char *folder, const char *target, const json_value *manifests, tcr_layout *layout,
                          tcr_manifest *manifest, tcr_problem *problem) {
  char names[512] = "";
  tcr_text text = {names, sizeof names, 0};
  for (const json_value *entry = manifests->as.first; entry; entry = entry->next) {
    const char *name = tcr_annotation(entry, "vnd.toolchain.target");
    if (name == NULL) return tcr_damaged(problem, folder, "the index has a bundle without a target");
    if (strcmp(name, target) == 0) return tcr_open_bundle(folder, entry, layout, manifest, problem);
    tcr_append(&text, "%s%s", text.length ? ", " : "", name);
  }
  return tcr_fail(problem, TC_USAGE, folder, "", "has no bundle for target '%s'; it has %s", target, names);
}

/* PATH@TARGET; an existing path with an @ in its name is a path. */
static int32_t split_reference(const char *reference, const char **target, char folder[TCR_PATH],
                               tcr_problem *problem) {
  struct stat info;
  const char *at = strrchr(reference, '@');
  size_t length = strlen(reference);
  if (length == 0 || length >= TCR_PATH)
    return tcr_fail(problem, TC_USAGE, "", "", "a bundle's path has 1 to %d bytes, got %zu", TCR_PATH - 1, length);
  memcpy(folder, reference, length + 1);
  if (at == NULL || stat(reference, &info) == 0) return TC_OK;
  folder[at - reference] = 0;
  if (*target != NULL && strcmp(*target, at + 1) != 0)
    return tcr_fail(problem, TC_USAGE, reference, "", "names target '%s', but target '%s' is asked for too", at + 1,
                    *target);
  *target = at + 1;
  return TC_OK;
}

int32_t tcr_open_layout(const char *reference, const char *target, tcr_layout *layout, tcr_manifest *manifest,
                        tcr_problem *problem) {
  char folder[TCR_PATH];
  json_document index;
  memset(layout, 0, sizeof *layout);
  memset(manifest, 0, sizeof *manifest);
  int32_t status = split_reference(reference, &target, folder, problem);
  if (status == TC_OK) status = tcr_check_layout(folder, problem);
  if (status == TC_OK) status = tcr_read_index(folder, &index, problem);
  if (status != TC_OK) return status;
  const json_value *manifests = json_get(index.root, "manifests");
  status = target != NULL && *target ? open_named(folder, target, manifests, layout, manifest, problem)
                                     : open_best(folder, manifests, layout, manifest, problem);
  json_free(&index);
  return status;
}
