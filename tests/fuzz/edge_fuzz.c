/* Fuzzes the edge runtime: its readers of JSON, arrays, libraries and bundles, and the C interface.
 *
 *   edge_fuzz CORPUS MODEL.so SECONDS [SEED [FOLDER]]
 *   edge_fuzz CORPUS MODEL.so 0 1 FOLDER       writes those of CORPUS that are needed to reach as much
 *
 * CORPUS holds inputs, whose suffix is what reads them: .json, .npz, .elf, .bundle (bundle.json of a linked engine,
 * then random runs) and .layout (a whole release, see try_layout).  Inputs that reach new code are kept, and written
 * to FOLDER.  Compiled with -fsanitize-coverage=trace-pc and with malloc and calloc wrapped, so that allocations fail
 * too.  One input that crashes is written to ./crash.KIND. */
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

#define LARGEST 65536
#define MAX_CORPUS 4096
#define MAP 65536
#define SECTIONS 16

typedef struct input {
  const char *kind;
  unsigned char *data;
  size_t size;
} input;

static const char *const kinds[] = {"json", "npz", "elf", "bundle", "layout"};
static input corpus[MAX_CORPUS];
static int corpus_size;
static input current;
static char folder[256];
static const char *model_path;
static tcr_bytes model_file;
static unsigned char seen[MAP], now[MAP];
static unsigned fresh;
static uint64_t state;
static int64_t round_sizes[4];
static long fail_after = -1;

/* Coverage: a bit for each place in the code (relative, so that it is the same in each process). */
__attribute__((no_sanitize_address, no_sanitize_undefined)) void __sanitizer_cov_trace_pc(void) {
  uintptr_t place = (uintptr_t)__builtin_return_address(0) - (uintptr_t)&kinds;
  unsigned at = (unsigned)(place ^ place >> 16) % MAP;
  if (!now[at]) now[at] = 1;
  if (!seen[at]) seen[at] = 1, fresh++;
}

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void __sanitizer_set_death_callback(void (*callback)(void));

static int fails(void) { return fail_after >= 0 && fail_after-- == 0; }
void *__wrap_malloc(size_t bytes) { return fails() ? NULL : __real_malloc(bytes); }
void *__wrap_calloc(size_t count, size_t bytes) { return fails() ? NULL : __real_calloc(count, bytes); }

static uint32_t rnd(uint32_t below) { /* xorshift64* (Vigna) */
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return below ? (uint32_t)((state * 2685821657736338717u) >> 32) % below : 0;
}

static void write_file(const char *path, const void *data, size_t size) {
  FILE *file = fopen(path, "wb");
  if (file == NULL || fwrite(data, 1, size, file) != size || fclose(file) != 0) {
    perror(path);
    _exit(3);
  }
}

static void on_death(void) {
  char path[64];
  snprintf(path, sizeof path, "crash.%s", current.kind);
  write_file(path, current.data, current.size);
}

static void on_alarm(int number) {
  (void)number;
  fputs("an input takes more than 20 s\n", stderr);
  on_death();
  _exit(4);
}

/* A copy in memory of exactly its size, so that reading past its end is noticed. */
static unsigned char *exact(const void *data, size_t size) {
  unsigned char *copy = __real_malloc(size ? size : 1);
  memcpy(copy, data, size);
  return copy;
}

static void try_json(const input *in) {
  json_document document;
  size_t offset;
  char *text = (char *)exact(in->data, in->size);
  if (json_parse(&document, text, in->size, &offset) == NULL) {
    if (!json_equal(document.root, document.root)) abort();
    json_free(&document);
  }
  free(text);
}

static void try_npz(const input *in) {
  tcr_problem problem;
  tcr_array array;
  uint32_t count;
  unsigned char *data = exact(in->data, in->size);
  if (tcr_parse_npy(data, in->size, "fuzz", &array, &problem) == TC_OK && array.bytes)
    (void)tcr_element(array.dtype, array.data, array.bytes / tc_item_size(array.dtype) - 1);
  static const char *const names[] = {"input:image", "output:scores", "image"};
  for (int i = 0; i < 3; i++)
    if (tcr_find_npz(data, in->size, "fuzz", names[i], &array, &problem) == TC_OK && array.data && array.bytes)
      (void)tcr_element(array.dtype, array.data, array.bytes / tc_item_size(array.dtype) - 1);
  tcr_count_npz(data, in->size, "fuzz", "output:", &count, &problem);
  free(data);
}

static void try_elf(const input *in) {
  char path[300];
  tcr_problem problem;
  snprintf(path, sizeof path, "%s/library", folder);
  write_file(path, in->data, in->size);
  tcr_check_library(path, "library", &problem);
}

/* Random arguments, mostly near the right ones; buffers have exactly the bytes that the values claim. */
static void random_value(tc_bundle *bundle, uint32_t index, bool output, tc_value *value) {
  tc_tensor_info info = {.size = sizeof info};
  size_t bytes = 0;
  memset(value, 0, sizeof *value);
  if ((output ? tc_output : tc_input)(bundle, index, &info) != TC_OK) return;
  value->name = rnd(4) ? info.name : rnd(8) ? NULL : "other";
  value->dtype = rnd(16) ? info.dtype : (int32_t)rnd(15) - 1;
  value->rank = rnd(16) ? info.rank : (int32_t)rnd(12) - 2;
  for (int i = 0; i < TC_MAX_RANK; i++) {
    int64_t size = i < info.rank ? info.shape[i] : 0;
    if (size < 0) size = round_sizes[-(size + 1) & 3]; /* the same dimension has the same size, mostly */
    value->shape[i] = rnd(64) ? size : rnd(4) ? (int64_t)rnd(20) : (int64_t)state;
  }
  if (!tcr_bytes_of(value->dtype, value->rank < 0 || value->rank > TC_MAX_RANK ? 0 : value->rank, value->shape,
                    &bytes) ||
      bytes > 65536)
    bytes = rnd(256);
  value->bytes = output ? rnd(5000) : rnd(20) ? bytes : rnd(64);
  value->data = rnd(20) ? calloc(1, value->bytes ? value->bytes : 1) : NULL;
}

static void use(tc_bundle *bundle) {
  char text[64];
  tc_output_check check = {sizeof check, 0, 0, 0};
  for (int round = 0; round < 4; round++) {
    tc_value in[3], out[3];
    for (int i = 0; i < 4; i++) round_sizes[i] = rnd(8) ? 1 + (int64_t)rnd(12) : (int64_t)rnd(70);
    uint32_t inputs = tc_num_inputs(bundle), outputs = tc_num_outputs(bundle);
    inputs = inputs > 3 || !rnd(10) ? rnd(4) : inputs;
    outputs = outputs > 3 || !rnd(10) ? rnd(4) : outputs;
    for (uint32_t i = 0; i < 3; i++) random_value(bundle, i, false, &in[i]), random_value(bundle, i, true, &out[i]);
    void *kept[3] = {out[0].data, out[1].data, out[2].data};
    size_t room[3] = {out[0].bytes, out[1].bytes, out[2].bytes};
    (void)tc_output_shapes(bundle, in, inputs, out, outputs);
    for (uint32_t i = 0; i < 3; i++) { /* now with memory of the size that it told, often */
      size_t needed = out[i].bytes;
      out[i].bytes = room[i];
      if (needed > 1 << 20 || !rnd(4)) continue;
      free(kept[i]);
      out[i].data = kept[i] = malloc(needed ? needed : 1);
      out[i].bytes = needed;
    }
    (void)tc_run(bundle, in, inputs, out, outputs);
    for (uint32_t i = 0; i < 3; i++) free(in[i].data), free(kept[i]);
  }
  (void)tc_self_test(bundle, rnd(2) ? &check : NULL, rnd(3));
  (void)tc_last_error(bundle, text, rnd(sizeof text));
  for (uint32_t i = 0; i < 4; i++) {
    tc_dim_info dim = {rnd(8) ? sizeof dim : rnd(40), 0, NULL, 0, 0};
    (void)tc_dim_at(bundle, i, &dim);
  }
}

static void try_bundle(const input *in) {
  tc_options options = TC_OPTIONS;
  tc_bundle *bundle = NULL;
  char error[200], *text = (char *)exact(in->data, in->size);
  options.flags = rnd(8) | (rnd(16) ? 0 : TC_FLAG_DESCRIBE);
  options.error = error;
  options.error_bytes = rnd(sizeof error + 1);
  if (tc_open_linked(toolchain_model(), rnd(32) ? text : NULL, in->size, &options, &bundle) == TC_OK) use(bundle);
  tc_close(bundle);
  free(text);
}

/* Appends a section with @D<k> and @S<k> replaced by digest and size of the section k before it. */
static size_t expand(const unsigned char *from, size_t size, char digests[][TCR_DIGEST + 1], const size_t *sizes,
                     int done, char *to, size_t room) {
  static const char numbers[] = "0123456789abcdef";
  tcr_text text = {to, room, 0};
  for (size_t i = 0; i < size && text.length < room; i++) {
    const char *digit = i + 2 < size && from[i + 2] ? strchr(numbers, from[i + 2]) : NULL;
    if (from[i] == '@' && digit != NULL && (from[i + 1] == 'D' || from[i + 1] == 'S') && digit - numbers < done) {
      long k = digit - numbers;
      if (from[i + 1] == 'D')
        tcr_append(&text, "%s", digests[k]);
      else
        tcr_append(&text, "%zu", sizes[k]);
      i += 2;
    } else {
      to[text.length++] = (char)from[i];
    }
  }
  return text.length < room ? text.length : room;
}

/* A release: sections that end with the line "%%", each a blob, whose digest later ones may name; section 0 is the
 * library (given by MODEL.so), the last is index.json, so that changed content is vouched for by the right digests. */
static void try_layout(const input *in) {
  static char blob[2 * LARGEST], paths[SECTIONS][400];
  char digests[SECTIONS][TCR_DIGEST + 1], path[300];
  size_t sizes[SECTIONS];
  int count = 0, used = 0;
  tcr_sha256 hash;
  const unsigned char *at = in->data, *end = in->data + in->size;
  snprintf(path, sizeof path, "%s/index.json", folder);
  while (at <= end && count < SECTIONS) {
    const unsigned char *stop = memmem(at, (size_t)(end - at), "\n%%\n", 4);
    size_t raw = (size_t)((stop ? stop : end) - at);
    const void *data = count ? (const void *)blob : model_file.data;
    size_t size = count ? expand(at, raw, digests, sizes, count, blob, sizeof blob) : model_file.size;
    sizes[count] = size;
    tcr_sha256_start(&hash);
    tcr_sha256_add(&hash, data, size);
    tcr_sha256_end(&hash, digests[count]);
    if (stop == NULL) {
      write_file(path, data, size);
      break;
    }
    snprintf(paths[used], sizeof paths[used], "%s/blobs/sha256/%s", folder, digests[count++] + 7);
    write_file(paths[used++], data, size);
    at = stop + 4;
  }
  tc_options options = TC_OPTIONS;
  tc_bundle *bundle = NULL;
  char error[1024];
  options.flags = rnd(8) | (rnd(16) ? 0 : TC_FLAG_DESCRIBE);
  options.threads = 1;
  options.error = error;
  options.error_bytes = sizeof error;
  if (tc_open(folder, &options, &bundle) == TC_OK) use(bundle);
  tc_close(bundle);
  for (int i = 0; i < used; i++) unlink(paths[i]);
}

static void try_one(const input *in) {
  static void (*const all[])(const input *) = {try_json, try_npz, try_elf, try_bundle, try_layout};
  current = *in;
  state = 88172645463325252u; /* what a run does depends on its input alone */
  for (size_t i = 0; i < in->size; i++) state = (state ^ in->data[i]) * 1099511628211u;
  state |= 1;
  fail_after = rnd(8) ? -1 : (long)rnd(60);
  alarm(20);
  for (int i = 0; i < 5; i++)
    if (in->kind == kinds[i]) all[i](in);
  alarm(0);
  fail_after = -1;
}

static void mutate(input *in) {
  static const char *const words[] = {"null",
                                      "-1",
                                      "0",
                                      "1e308",
                                      "9223372036854775807",
                                      "4294967296",
                                      "[]",
                                      "{}",
                                      "\"\"",
                                      "\"batch\"",
                                      "\\u0000",
                                      "\\ud800",
                                      "[[[[[[[[",
                                      "}",
                                      "]",
                                      ",",
                                      "\"min\":",
                                      "true",
                                      "2",
                                      "64",
                                      "\xff",
                                      "'<f2'",
                                      "\n%%\n",
                                      "@D1",
                                      "@S2",
                                      "\"float16\"",
                                      "\"int8\"",
                                      "\"sizes\":{\"batch\":3}",
                                      "\"batch\":true",
                                      "\"pad\":-1.5"};
  for (uint32_t rounds = 1 + rnd(4); rounds; rounds--) {
    uint32_t size = (uint32_t)in->size, at = rnd(size + 1), length = rnd(1 + rnd(64));
    const char *word = words[rnd(sizeof words / sizeof *words)];
    const input *other = &corpus[rnd((uint32_t)corpus_size)];
    const void *put = word;
    size_t bytes = strlen(word);
    switch (rnd(7)) {
      case 0:
        if (at < size) in->data[at] ^= (unsigned char)(1 << rnd(8));
        continue;
      case 1:
        if (at < size) in->data[at] = (unsigned char)rnd(256);
        continue;
      case 2: /* remove */
        if (length > size - at) length = size - at;
        memmove(in->data + at, in->data + at + length, size - at - length);
        in->size -= length;
        continue;
      case 3: in->size = rnd(8) ? in->size : at; continue;
      case 4: /* a part of another input */
        if (other->size == 0) continue;
        put = other->data + rnd((uint32_t)other->size);
        bytes = (size_t)(other->data + other->size - (const unsigned char *)put);
        if (bytes > length) bytes = length;
        break;
      case 5: /* in place of what is there */
        if (bytes > size - at) continue;
        memcpy(in->data + at, put, bytes);
        continue;
      default: break;
    }
    if (in->size + bytes > LARGEST) continue;
    memmove(in->data + at + bytes, in->data + at, in->size - at);
    memcpy(in->data + at, put, bytes);
    in->size += bytes;
  }
}

static void keep(const input *in, const char *save) {
  if (corpus_size == MAX_CORPUS) return;
  corpus[corpus_size++] = (input){in->kind, exact(in->data, in->size), in->size};
  if (save == NULL) return;
  char path[600], digest[TCR_DIGEST + 1];
  tcr_sha256 hash;
  tcr_sha256_start(&hash);
  tcr_sha256_add(&hash, in->data, in->size);
  tcr_sha256_end(&hash, digest);
  snprintf(path, sizeof path, "%s/%.16s.%s", save, digest + 7, in->kind);
  write_file(path, in->data, in->size);
}

static int by_name(const struct dirent **one, const struct dirent **other) {
  return strcmp((*one)->d_name, (*other)->d_name);
}

static void read_corpus(const char *from) {
  struct dirent **names = NULL;
  int count = scandir(from, &names, NULL, by_name);
  for (int i = 0; i < count; i++) {
    const char *dot = strrchr(names[i]->d_name, '.');
    for (int k = 0; dot != NULL && k < 5 && corpus_size < MAX_CORPUS; k++) {
      char path[1024];
      tcr_bytes bytes;
      tcr_problem problem;
      if (strcmp(dot + 1, kinds[k]) != 0) continue;
      snprintf(path, sizeof path, "%s/%s", from, names[i]->d_name);
      if (tcr_read_file(path, LARGEST, &bytes, &problem) != TC_OK) continue;
      corpus[corpus_size++] = (input){kinds[k], bytes.data, bytes.size};
    }
    free(names[i]);
  }
  free(names);
}

/* Small ones first: with no time left, what is written is a small corpus that reaches as much. */
static int by_size(const void *one, const void *other) {
  const input *a = one, *b = other;
  return (a->size > b->size) - (a->size < b->size);
}

int main(int argc, char **argv) {
  static unsigned char buffer[LARGEST];
  tcr_problem problem;
  char path[300];
  if (argc < 4) return 2;
  uint64_t seed = argc > 4 ? strtoull(argv[4], NULL, 10) : 1;
  const char *save = argc > 5 ? argv[5] : NULL;
  long runs = 0;
  model_path = argv[2];
  if (tcr_read_file(model_path, 1 << 24, &model_file, &problem) != TC_OK) return 2;
  snprintf(folder, sizeof folder, "%s/edge-fuzz-XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
  if (mkdtemp(folder) == NULL) return 2;
  for (const char *const *part = (const char *const[]){"blobs", "blobs/sha256", NULL}; *part; part++) {
    snprintf(path, sizeof path, "%s/%s", folder, *part);
    mkdir(path, 0700);
  }
  snprintf(path, sizeof path, "%s/oci-layout", folder);
  write_file(path, "{\"imageLayoutVersion\":\"1.0.0\"}", 30);
  signal(SIGALRM, on_alarm);
  __sanitizer_set_death_callback(on_death);
  read_corpus(argv[1]);
  int seeds = corpus_size;
  if (seeds == 0) return 2;
  unsigned covered = 0;
  qsort(corpus, (size_t)seeds, sizeof *corpus, by_size);
  for (int i = 0; i < seeds; i++, runs++) {
    fresh = 0;
    try_one(&corpus[i]);
    covered += fresh;
    if (fresh && atoi(argv[3]) == 0 && save != NULL) keep(&corpus[i], save);
  }
  time_t end = time(NULL) + atoi(argv[3]);
  for (uint64_t number = 0; time(NULL) < end; number++, runs++) {
    state = (seed + 1) * 0x9e3779b97f4a7c15u ^ (number + 1) * 0xd1342543de82ef95u;
    const input *parent = &corpus[rnd((uint32_t)corpus_size)];
    input child = {parent->kind, buffer, parent->size};
    memcpy(buffer, parent->data, parent->size);
    mutate(&child);
    fresh = 0;
    try_one(&child);
    covered += fresh;
    if (fresh) keep(&child, save);
  }
  printf("{\"executions\": %ld, \"seeds\": %d, \"kept\": %d, \"covered\": %u}\n", runs, seeds, corpus_size - seeds,
         covered);
  snprintf(path, sizeof path, "rm -rf '%s'", folder);
  for (int i = 0; i < corpus_size; i++) free(corpus[i].data);
  free(model_file.data);
  return system(path);
}
