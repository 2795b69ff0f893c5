/* Bundles in OCI image layouts; what no digest vouches for is not believed (docs/bundle-format.md). */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "internal.h"

#define INDEX_TYPE "application/vnd.oci.image.index.v1+json"
#define MANIFEST_TYPE "application/vnd.oci.image.manifest.v1+json"
#define ARTIFACT_TYPE "application/vnd.cncf.model.manifest.v1+json"
#define CONFIG_TYPE "application/vnd.cncf.model.config.v1+json"
#define OCI_LAYOUT "{\"imageLayoutVersion\":\"1.0.0\"}"
#define MAX_BUNDLES 256
#define MAX_FILES 4096

static int32_t join(const char *folder, const char *name, char path[TCR_PATH], tcr_problem *problem) {
  int length = snprintf(path, TCR_PATH, "%s/%s", folder, name);
  if (length > 0 && length < TCR_PATH) return TC_OK;
  return tcr_fail(problem, TC_USAGE, "", "", "the path is longer than %d bytes", TCR_PATH - 1);
}

static int32_t blob_path(const char *folder, const char *digest, char path[TCR_PATH], tcr_problem *problem) {
  char name[16 + TCR_DIGEST];
  snprintf(name, sizeof name, "blobs/sha256/%s", digest + 7);
  return join(folder, name, path, problem);
}

int32_t tcr_blob_path(const tcr_layout *layout, const char *digest, char path[TCR_PATH], tcr_problem *problem) {
  return blob_path(layout->path, digest, path, problem);
}

int32_t tcr_read_blob(const char *folder, const char *digest, uint64_t size, uint64_t limit, tcr_bytes *bytes,
                      tcr_problem *problem) {
  char path[TCR_PATH], found[TCR_DIGEST + 1];
  tcr_sha256 hash;
  int32_t status = blob_path(folder, digest, path, problem);
  if (status != TC_OK) return status;
  status = tcr_read_file(path, limit, bytes, problem);
  if (status != TC_OK) return status;
  tcr_sha256_start(&hash);
  tcr_sha256_add(&hash, bytes->data, bytes->size);
  tcr_sha256_end(&hash, found);
  if (bytes->size != size)
    status = tcr_damaged(problem, path, "has %zu bytes, expected %llu", bytes->size, (unsigned long long)size);
  else if (strcmp(found, digest) != 0)
    status = tcr_damaged(problem, path, "content has digest %s, expected %s", found, digest);
  if (status != TC_OK) {
    free(bytes->data);
    memset(bytes, 0, sizeof *bytes);
  }
  return status;
}

static int32_t parse(json_document *document, const tcr_bytes *bytes, const char *where, tcr_problem *problem) {
  size_t offset;
  const char *wrong = json_parse(document, (const char *)bytes->data, bytes->size, &offset);
  if (wrong == json_no_memory) return tcr_no_memory(problem, bytes->size, where);
  if (wrong != NULL) return tcr_damaged(problem, where, "is not JSON (%s at byte %zu)", wrong, offset);
  if (json_is(document->root, JSON_OBJECT)) return TC_OK;
  json_free(document);
  return tcr_damaged(problem, where, "is not a JSON object");
}

const char *tcr_annotation(const json_value *descriptor, const char *key) {
  return json_text(json_get(json_get(descriptor, "annotations"), key));
}

static bool texts(const json_value *object) {
  if (object == NULL) return true;
  if (object->kind != JSON_OBJECT || object->count > MAX_FILES) return false;
  for (const json_value *value = object->as.first; value; value = value->next)
    if (value->kind != JSON_STRING) return false;
  return true;
}

static bool is_digest(const char *text) {
  return text != NULL && strlen(text) == TCR_DIGEST && memcmp(text, "sha256:", 7) == 0 &&
         strspn(text + 7, "0123456789abcdef") == TCR_DIGEST - 7;
}

static int32_t parse_descriptor(const json_value *data, tcr_file *file, const char *where, tcr_problem *problem) {
  const json_value *size = json_get(data, "size");
  file->digest = json_text(json_get(data, "digest"));
  if (!is_digest(file->digest))
    return tcr_damaged(problem, where, "a descriptor's digest must be sha256: and 64 lower-case digits");
  if (size == NULL || !size->integer || size->whole < 0)
    return tcr_damaged(problem, where, "the size of %s must be a number of bytes", file->digest);
  file->size = (uint64_t)size->whole;
  if (json_text(json_get(data, "mediaType")) == NULL || !texts(json_get(data, "annotations")) ||
      !texts(json_get(data, "platform")))
    return tcr_damaged(problem, where, "the descriptor of %s lacks its media type, or holds more than text",
                       file->digest);
  file->name = tcr_annotation(data, "org.cncf.model.filepath");
  return TC_OK;
}

/* Reads a verified blob of JSON. */
static int32_t read_json(const char *folder, const tcr_file *file, json_document *document, tcr_problem *problem) {
  char path[TCR_PATH];
  tcr_bytes bytes;
  int32_t status = tcr_read_blob(folder, file->digest, file->size, JSON_MAX_BYTES, &bytes, problem);
  if (status != TC_OK) return status;
  status = blob_path(folder, file->digest, path, problem);
  if (status == TC_OK) status = parse(document, &bytes, path, problem);
  free(bytes.data);
  return status;
}

/* The annotations of a signed image index: its own and one more, by which cosign finds it (docs/distribution.md). */
static bool marked(const json_value *annotations, const json_value *own) {
  if (!json_is(annotations, JSON_OBJECT) || annotations->count != own->count + 1 ||
      !json_text_is(annotations, "kind", "dev.cosignproject.cosign/imageIndex"))
    return false;
  for (const json_value *value = own->as.first; value; value = value->next)
    if (!json_equal(json_get(annotations, value->key), value)) return false;
  return true;
}

/* Signatures are not used here: they must only look like some. */
static int32_t check_signatures(const json_value *list, const char *where, tcr_problem *problem) {
  tcr_file file;
  for (const json_value *entry = list->as.first->next; entry; entry = entry->next) {
    const char *tag = tcr_annotation(entry, "org.opencontainers.image.ref.name");
    int32_t status = parse_descriptor(entry, &file, where, problem);
    if (status != TC_OK) return status;
    if (!json_text_is(entry, "mediaType", MANIFEST_TYPE) || tag == NULL || strlen(tag) < 4 ||
        strcmp(tag + strlen(tag) - 4, ".sig") != 0)
      return tcr_damaged(problem, where, "names %.19s, which is no signature", file.digest);
  }
  return TC_OK;
}

/* Everything in index.json must follow from the image index that it names, since no digest covers it. */
static int32_t check_root(const json_value *root, const json_value *list, const json_value *index, const char *where,
                          tcr_problem *problem) {
  const json_value *version = json_get(root, "schemaVersion"), *descriptor = list->as.first;
  const json_value *own = json_get(index, "annotations"), *annotations = json_get(descriptor, "annotations");
  if (root->count == 3 && version != NULL && version->whole == 2 && json_text_is(root, "mediaType", INDEX_TYPE) &&
      descriptor->count == 5 && json_text_is(descriptor, "artifactType", ARTIFACT_TYPE) &&
      (list->count == 1 ? json_equal(annotations, own) : marked(annotations, own)))
    return check_signatures(list, where, problem);
  return tcr_damaged(problem, where, "does not agree with the image index that it names");
}

int32_t tcr_read_index(const char *folder, json_document *index, tcr_problem *problem) {
  char path[TCR_PATH];
  tcr_bytes bytes;
  tcr_file file;
  json_document root;
  int32_t status = join(folder, "index.json", path, problem);
  if (status == TC_OK) status = tcr_read_file(path, JSON_MAX_BYTES, &bytes, problem);
  if (status != TC_OK) return status;
  status = parse(&root, &bytes, path, problem);
  free(bytes.data);
  if (status != TC_OK) return status;
  const json_value *list = json_get(root.root, "manifests");
  const json_value *descriptor = json_is(list, JSON_LIST) ? list->as.first : NULL;
  if (descriptor == NULL || !json_text_is(descriptor, "mediaType", INDEX_TYPE))
    status = tcr_damaged(problem, path, "must name an image index under 'manifests'");
  if (status == TC_OK) status = parse_descriptor(descriptor, &file, path, problem);
  if (status == TC_OK) status = read_json(folder, &file, index, problem);
  if (status == TC_OK) {
    const json_value *manifests = json_get(index->root, "manifests"), *notes = json_get(index->root, "annotations");
    if (!json_is(manifests, JSON_LIST) || manifests->count == 0 || manifests->count > MAX_BUNDLES || notes == NULL ||
        !texts(notes))
      status = tcr_damaged(problem, path, "a release's index must hold manifests and annotations");
    if (status == TC_OK) status = check_root(root.root, list, index->root, path, problem);
    if (status != TC_OK) json_free(index);
  }
  json_free(&root);
  return status;
}

int32_t tcr_check_layout(const char *folder, tcr_problem *problem) {
  char path[TCR_PATH];
  struct stat info;
  tcr_bytes bytes;
  if (stat(folder, &info) != 0) {
    if (errno == ENOENT || errno == ENOTDIR) return tcr_fail(problem, TC_USAGE, folder, "", "does not exist");
    return tcr_fail(problem, TC_STORAGE, folder, "", "cannot be read: %s", strerror(errno));
  }
  int found = 0;
  static const char *const names[] = {"oci-layout", "index.json", "blobs"};
  for (int i = 0; S_ISDIR(info.st_mode) && i < 3; i++) {
    struct stat ignored;
    int32_t status = join(folder, names[i], path, problem);
    if (status != TC_OK) return status;
    found += stat(path, &ignored) == 0;
  }
  if (!found) return tcr_fail(problem, TC_USAGE, folder, "", "is not a bundle or release (no OCI image layout)");
  int32_t status = join(folder, "oci-layout", path, problem);
  if (status == TC_OK) status = tcr_read_file(path, 4096, &bytes, problem);
  if (status != TC_OK) return status;
  if (bytes.size != sizeof OCI_LAYOUT - 1 || memcmp(bytes.data, OCI_LAYOUT, bytes.size) != 0)
    status = tcr_damaged(problem, path, "is not %s", OCI_LAYOUT);
  free(bytes.data);
  return status;
}

static int32_t list_files(tcr_layout *layout, const char *where, tcr_problem *problem) {
  const json_value *layers = json_get(layout->document.root, "layers");
  const json_value *config = json_get(layout->document.root, "config");
  if (!json_is(layers, JSON_LIST) || layers->count == 0 || layers->count > MAX_FILES ||
      !json_text_is(config, "mediaType", CONFIG_TYPE))
    return tcr_damaged(problem, where, "a bundle's manifest must hold a configuration and 1 to %d layers", MAX_FILES);
  layout->files = calloc(layers->count, sizeof *layout->files);
  if (layout->files == NULL) return tcr_no_memory(problem, layers->count * sizeof *layout->files, "the list of files");
  int32_t status = parse_descriptor(config, &layout->config, where, problem);
  for (const json_value *layer = layers->as.first; layer && status == TC_OK; layer = layer->next) {
    tcr_file *file = &layout->files[layout->num_files];
    status = parse_descriptor(layer, file, where, problem);
    if (status != TC_OK) break;
    if (file->name == NULL)
      return tcr_damaged(problem, where, "layer %.19s lacks the annotation org.cncf.model.filepath", file->digest);
    if (tcr_find_file(layout, file->name) != NULL)
      return tcr_damaged(problem, where, "unsafe file name: '%s' is given twice", file->name);
    layout->num_files++;
  }
  return status;
}

/* Opens one bundle of a release; on failure nothing is left to free. */
int32_t tcr_open_bundle(const char *folder, const json_value *descriptor, tcr_layout *layout, tcr_manifest *manifest,
                        tcr_problem *problem) {
  char path[TCR_PATH];
  tcr_file self;
  tcr_bytes bytes;
  memset(layout, 0, sizeof *layout);
  memset(manifest, 0, sizeof *manifest);
  int32_t status = parse_descriptor(descriptor, &self, folder, problem);
  if (status != TC_OK) return status;
  status = blob_path(folder, self.digest, path, problem);
  if (status != TC_OK) return status;
  if (!json_text_is(descriptor, "mediaType", MANIFEST_TYPE) || !json_text_is(descriptor, "artifactType", ARTIFACT_TYPE))
    return tcr_damaged(problem, path, "must be a manifest (%s) of type %s", MANIFEST_TYPE, ARTIFACT_TYPE);
  status = read_json(folder, &self, &layout->document, problem);
  if (status != TC_OK) return status;
  memcpy(layout->digest, self.digest, sizeof layout->digest);
  layout->path = strdup(folder);
  status = layout->path == NULL ? tcr_no_memory(problem, strlen(folder), "a path") : list_files(layout, path, problem);
  const tcr_file *file = status == TC_OK ? tcr_find_file(layout, "bundle.json") : NULL;
  if (status == TC_OK && file == NULL) status = tcr_damaged(problem, path, "the bundle has no bundle.json");
  if (status == TC_OK) status = tcr_read_blob(folder, file->digest, file->size, JSON_MAX_BYTES, &bytes, problem);
  if (status == TC_OK) {
    char where[TCR_PATH + 16];
    snprintf(where, sizeof where, "bundle.json (%s/blobs/sha256/%s)", folder, file->digest + 7);
    status = tcr_parse_manifest(manifest, (const char *)bytes.data, bytes.size, where, problem);
    free(bytes.data);
  }
  for (uint32_t i = 0; status == TC_OK && i < manifest->num_variants; i++)
    if (tcr_find_file(layout, manifest->variants[i].file) == NULL)
      status = tcr_damaged(problem, path, "the engine file %s is not in the bundle", manifest->variants[i].file);
  const char *target = tcr_annotation(descriptor, "vnd.toolchain.target");
  if (status == TC_OK && (target == NULL || strcmp(target, manifest->target) != 0))
    status = tcr_damaged(problem, path, "the index and bundle.json name different targets");
  if (status == TC_OK) return status;
  tcr_free_manifest(manifest);
  tcr_free_layout(layout);
  return status;
}

const tcr_file *tcr_find_file(const tcr_layout *layout, const char *name) {
  for (uint32_t i = 0; i < layout->num_files; i++)
    if (strcmp(layout->files[i].name, name) == 0) return &layout->files[i];
  return NULL;
}

int32_t tcr_verify_all(const tcr_layout *layout, tcr_problem *problem) {
  char path[TCR_PATH];
  for (uint32_t i = 0; i <= layout->num_files; i++) {
    const tcr_file *file = i == layout->num_files ? &layout->config : &layout->files[i];
    int32_t status = blob_path(layout->path, file->digest, path, problem);
    if (status == TC_OK)
      status = tcr_hash_file(path, file == &layout->config ? "the configuration" : file->name, file->size, file->digest,
                             problem);
    if (status != TC_OK) return status;
  }
  return TC_OK;
}

void tcr_free_layout(tcr_layout *layout) {
  free(layout->path);
  free(layout->files);
  json_free(&layout->document);
  memset(layout, 0, sizeof *layout);
}
