/* Arrays from and to files: .npy, .npz, and raw bytes. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"

static const char *named(const char *const *list, int count, const char *name) {
  size_t length = strlen(name);
  for (int i = 0; i < count; i++)
    if (strncmp(list[i], name, length) == 0 && list[i][length] == '=') return list[i] + length + 1;
  return NULL;
}

static int64_t size_of_dim(tc_bundle *bundle, const cli_options *options, int64_t size) {
  tc_dim_info dim = {sizeof dim, 0, "", 0, 0};
  if (size >= 0 || tc_dim_at(bundle, (uint32_t)(-(size + 1)), &dim) != TC_OK) return size;
  const char *text = named(options->sizes, options->num_sizes, dim.name);
  return text != NULL ? strtoll(text, NULL, 10) : dim.min;
}

static void set_value(tc_value *value, const tc_tensor_info *info, const tcr_array *array) {
  *value = (tc_value){info->name, (void *)(uintptr_t)array->data, array->bytes, array->dtype, array->rank, {0}};
  memcpy(value->shape, array->shape, sizeof array->shape);
}

/* The shape that an input has by --size, and for raw bytes what is left for the first dynamic dimension. */
static int32_t declared(tc_bundle *bundle, const cli_options *options, const tc_tensor_info *info, tcr_array *array,
                        tcr_problem *problem) {
  memset(array, 0, sizeof *array);
  array->dtype = info->dtype;
  array->rank = info->rank;
  for (int32_t i = 0; i < info->rank; i++) array->shape[i] = size_of_dim(bundle, options, info->shape[i]);
  if (tcr_bytes_of(array->dtype, array->rank, array->shape, &array->bytes)) return TC_OK;
  return tcr_fail(problem, TC_BAD_INPUT, "--size", "", "input '%s' would be larger than the memory of this machine",
                  info->name);
}

static int32_t read_one(tc_bundle *bundle, const cli_options *options, const tc_tensor_info *info, const char *path,
                        cli_run *run, uint32_t index, tcr_problem *problem) {
  tcr_bytes bytes;
  tcr_array array;
  int32_t status = tcr_read_file(path, PTRDIFF_MAX - 1, &bytes, problem);
  if (status == TC_DAMAGED_BUNDLE) return tcr_fail(problem, TC_USAGE, path, "", "is no file that can be read");
  if (status != TC_OK) return status;
  run->files[index] = bytes.data;
  if (bytes.size >= 6 && memcmp(bytes.data, "\x93NUMPY", 6) == 0) {
    status = tcr_parse_npy(bytes.data, bytes.size, path, &array, problem);
  } else {
    status = declared(bundle, options, info, &array, problem);
    array.data = bytes.data;
    array.bytes = bytes.size; /* a wrong number of bytes is told by the run */
  }
  if (status == TC_OK) set_value(&run->inputs[index], info, &array);
  return status;
}

/* Numbers for a measurement: from 0 to 1 for floats, zeros for all else (an index that is always valid). */
static void invent(const tc_value *value) {
  uint32_t state = 1;
  if (value->dtype != TC_FLOAT32) memset(value->data, 0, value->bytes);
  for (size_t i = 0; value->dtype == TC_FLOAT32 && i < value->bytes / 4; i++) {
    state = state * 1664525u + 1013904223u;
    float number = (float)(state >> 8) / 16777216.0f;
    memcpy((char *)value->data + 4 * i, &number, 4);
  }
}

void cli_renew_inputs(cli_run *run) {
  for (uint32_t i = 0; i < run->num_inputs; i++)
    if (run->lent[i]) invent(&run->inputs[i]);
}

static int32_t invent_one(tc_bundle *bundle, const cli_options *options, const tc_tensor_info *info, cli_run *run,
                          uint32_t index, tcr_problem *problem) {
  tcr_array array;
  int32_t status = declared(bundle, options, info, &array, problem);
  if (status != TC_OK) return status;
  size_t bytes;
  array.data = tc_input_memory(bundle, index, &bytes);
  run->lent[index] = array.data != NULL && bytes == array.bytes;
  if (!run->lent[index]) {
    const size_t room = (array.bytes / TC_ALIGNMENT + 1) * TC_ALIGNMENT; /* aligned, or each run would copy it */
    array.data = run->files[index] = aligned_alloc(TC_ALIGNMENT, room);
    if (array.data == NULL) return tcr_no_memory(problem, array.bytes, info->name);
  }
  set_value(&run->inputs[index], info, &array);
  invent(&run->inputs[index]);
  return TC_OK;
}

static int32_t from_archive(const tcr_bytes *archive, const char *path, const char *name, tcr_array *array,
                            tcr_problem *problem) {
  char key[1100];
  int32_t status = tcr_find_npz(archive->data, archive->size, path, name, array, problem);
  snprintf(key, sizeof key, "input:%s", name);
  if (status == TC_OK && array->data == NULL)
    status = tcr_find_npz(archive->data, archive->size, path, key, array, problem);
  return status;
}

/* Before a missing input is told: that is what a wrong name leads to. */
static int32_t check_names(tc_bundle *bundle, const cli_options *options, tcr_problem *problem) {
  for (int i = 0; i < options->num_inputs; i++) {
    char allowed[TCR_TEXT / 2] = "";
    tcr_text text = {allowed, sizeof allowed, 0};
    bool known = false;
    for (uint32_t k = 0; k < tc_num_inputs(bundle) && !known; k++) {
      tc_tensor_info info = {.size = sizeof info};
      tc_input(bundle, k, &info);
      known = named(&options->inputs[i], 1, info.name) != NULL;
      tcr_append(&text, "%s%s", k ? ", " : "", info.name);
    }
    if (!known)
      return tcr_fail(problem, TC_BAD_INPUT, "--input", "", "the model has no input '%.*s'; it has %s",
                      (int)strcspn(options->inputs[i], "="), options->inputs[i], allowed);
  }
  return TC_OK;
}

int32_t cli_read_inputs(tc_bundle *bundle, const cli_options *options, bool invent, cli_run *run,
                        tcr_problem *problem) {
  tcr_bytes archive = {NULL, 0};
  int32_t status = check_names(bundle, options, problem);
  if (status != TC_OK) return status;
  run->num_inputs = tc_num_inputs(bundle);
  if (run->num_inputs > CLI_MANY) return tcr_fail(problem, TC_USAGE, "", "", "more than %d inputs", CLI_MANY);
  if (options->archive != NULL) status = tcr_read_file(options->archive, PTRDIFF_MAX - 1, &archive, problem);
  if (status == TC_DAMAGED_BUNDLE)
    return tcr_fail(problem, TC_USAGE, options->archive, "", "is no file that can be read");
  run->archive = archive.data;
  for (uint32_t i = 0; i < run->num_inputs && status == TC_OK; i++) {
    tc_tensor_info info = {.size = sizeof info};
    tcr_array array = {.data = NULL};
    tc_input(bundle, i, &info);
    const char *path = named(options->inputs, options->num_inputs, info.name);
    if (path == NULL && archive.data != NULL)
      status = from_archive(&archive, options->archive, info.name, &array, problem);
    if (status != TC_OK) break;
    if (path != NULL)
      status = read_one(bundle, options, &info, path, run, i, problem);
    else if (array.data != NULL)
      set_value(&run->inputs[i], &info, &array);
    else if (invent)
      status = invent_one(bundle, options, &info, run, i, problem);
    else
      status = tcr_fail(problem, TC_BAD_INPUT, "inputs", "give it with --input NAME=FILE or --inputs FILE.npz",
                        "input '%s' is missing", info.name);
  }
  return status;
}

int32_t cli_give_room(cli_run *run, tcr_problem *problem) {
  for (uint32_t i = 0; i < run->num_outputs; i++) {
    size_t room = run->outputs[i].bytes / TC_ALIGNMENT + 1;
    free(run->outputs[i].data);
    run->outputs[i].data = aligned_alloc(TC_ALIGNMENT, room * TC_ALIGNMENT);
    if (run->outputs[i].data == NULL) return tcr_no_memory(problem, run->outputs[i].bytes, "an output");
  }
  return TC_OK;
}

int32_t cli_make_outputs(tc_bundle *bundle, cli_run *run, tcr_problem *problem) {
  run->num_outputs = tc_num_outputs(bundle);
  if (run->num_outputs > CLI_MANY) return tcr_fail(problem, TC_USAGE, "", "", "more than %d outputs", CLI_MANY);
  int32_t status = tc_output_shapes(bundle, run->inputs, run->num_inputs, run->outputs, run->num_outputs);
  if (status != TC_OK) {
    tc_last_error(bundle, problem->text, sizeof problem->text);
    return status;
  }
  return cli_give_room(run, problem);
}

void cli_free(cli_run *run) {
  for (uint32_t i = 0; i < CLI_MANY; i++) {
    free(run->files[i]);
    free(run->outputs[i].data);
  }
  free(run->archive);
}

static uint32_t crc32(uint32_t crc, const void *data, size_t bytes) {
  const unsigned char *at = data;
  crc = ~crc;
  for (; bytes; bytes--) {
    crc ^= *at++;
    for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (0xedb88320u & (0u - (crc & 1)));
  }
  return ~crc;
}

static void put(unsigned char *to, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; i++) to[i] = (unsigned char)(value >> (8 * i));
}

/* A member of an uncompressed archive (APPNOTE.TXT 4.3.7), and its entry of the directory. */
static void write_member(FILE *file, FILE *directory, const char *name, const tc_value *value) {
  char header[256], path[1100];
  unsigned char local[30] = {0x50, 0x4b, 3, 4, 20}, entry[46] = {0x50, 0x4b, 1, 2, 20, 0, 20};
  size_t head = tcr_npy_header(value->dtype, value->rank, value->shape, header);
  snprintf(path, sizeof path, "%s.npy", name);
  uint32_t crc = crc32(crc32(0, header, head), value->data, value->bytes);
  put(entry + 12, 0x00210000, 4); /* 1980-01-01, the first date that there is */
  put(entry + 16, crc, 4);
  put(entry + 20, head + value->bytes, 4);
  put(entry + 24, head + value->bytes, 4);
  put(entry + 28, strlen(path), 2);
  put(entry + 42, (uint64_t)ftell(file), 4);
  memcpy(local + 6, entry + 8, 22);
  fwrite(local, 1, sizeof local, file);
  fputs(path, file);
  fwrite(header, 1, head, file);
  fwrite(value->data, 1, value->bytes, file);
  fwrite(entry, 1, sizeof entry, directory);
  fputs(path, directory);
}

static int32_t finish(FILE *file, const char *path, tcr_problem *problem) {
  bool failed = ferror(file) != 0;
  if (fclose(file) != 0 || failed)
    return tcr_fail(problem, TC_STORAGE, path, "", "cannot be written: %s", strerror(errno));
  return TC_OK;
}

static int32_t write_npz(tc_bundle *bundle, const cli_run *run, const char *path, tcr_problem *problem) {
  unsigned char end[22] = {0x50, 0x4b, 5, 6};
  char *text = NULL;
  size_t bytes = 0;
  FILE *file = fopen(path, "wb"), *directory = open_memstream(&text, &bytes);
  if (file == NULL) {
    if (directory != NULL) fclose(directory);
    free(text);
    return tcr_fail(problem, TC_STORAGE, path, "", "cannot be written: %s", strerror(errno));
  }
  for (uint32_t i = 0; directory != NULL && i < run->num_outputs; i++) {
    tc_tensor_info info = {.size = sizeof info};
    tc_output(bundle, i, &info);
    write_member(file, directory, info.name, &run->outputs[i]);
  }
  if (directory == NULL || fclose(directory) != 0) {
    fclose(file);
    return tcr_no_memory(problem, 0, "the archive's directory");
  }
  put(end + 8, run->num_outputs, 2);
  put(end + 10, run->num_outputs, 2);
  put(end + 12, bytes, 4);
  put(end + 16, (uint64_t)ftell(file), 4);
  fwrite(text, 1, bytes, file);
  fwrite(end, 1, sizeof end, file);
  free(text);
  return finish(file, path, problem);
}

static int32_t write_npy(const char *path, const tc_value *value, tcr_problem *problem) {
  char header[256];
  FILE *file = fopen(path, "wb");
  if (file == NULL) return tcr_fail(problem, TC_STORAGE, path, "", "cannot be written: %s", strerror(errno));
  fwrite(header, 1, tcr_npy_header(value->dtype, value->rank, value->shape, header), file);
  fwrite(value->data, 1, value->bytes, file);
  return finish(file, path, problem);
}

int32_t cli_write_outputs(tc_bundle *bundle, const cli_options *options, const cli_run *run, tcr_problem *problem) {
  int32_t status = TC_OK;
  for (int i = 0; i < options->num_outputs && status == TC_OK; i++) {
    const char *text = options->outputs[i], *path = NULL;
    size_t length = strlen(text);
    for (uint32_t k = 0; k < run->num_outputs && path == NULL && status == TC_OK; k++) {
      tc_tensor_info info = {.size = sizeof info};
      tc_output(bundle, k, &info);
      path = named(&text, 1, info.name);
      if (path != NULL) status = write_npy(path, &run->outputs[k], problem);
    }
    if (path != NULL) continue;
    if (length < 4 || strcmp(text + length - 4, ".npz") != 0)
      return tcr_fail(problem, TC_USAGE, "--output", "",
                      "must be FILE.npz or NAME=FILE.npy with an output's name, got '%s'", text);
    status = write_npz(bundle, run, text, problem);
  }
  return status;
}
