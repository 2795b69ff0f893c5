#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

static int32_t open_regular(const char *path, int *handle, uint64_t *size, tcr_problem *problem) {
  struct stat info;
  /* Not blocking: a pipe in the place of a file would wait for a writer. */
  *handle = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (*handle < 0) {
    if (errno == ENOENT || errno == ENOTDIR) return tcr_damaged(problem, path, "is missing");
    return tcr_fail(problem, TC_STORAGE, path, "", "cannot be read: %s", strerror(errno));
  }
  if (fstat(*handle, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(*handle);
    return tcr_damaged(problem, path, "is not a regular file");
  }
  *size = (uint64_t)info.st_size;
  return TC_OK;
}

static ssize_t read_some(int handle, void *to, size_t bytes) {
  ssize_t got;
  do got = read(handle, to, bytes);
  while (got < 0 && errno == EINTR);
  return got;
}

int32_t tcr_read_file(const char *path, uint64_t limit, tcr_bytes *bytes, tcr_problem *problem) {
  int handle;
  uint64_t size;
  memset(bytes, 0, sizeof *bytes);
  int32_t status = open_regular(path, &handle, &size, problem);
  if (status != TC_OK) return status;
  if (size > limit || size >= PTRDIFF_MAX - TC_ALIGNMENT) {
    close(handle);
    return tcr_damaged(problem, path, "has %llu bytes, at most %llu are allowed", (unsigned long long)size,
                       (unsigned long long)limit);
  }
  /* Aligned for the kernels, as are then the numbers in a .npy file, whose header is padded: runs need not copy them. */
  bytes->data = aligned_alloc(TC_ALIGNMENT, ((size_t)size / TC_ALIGNMENT + 1) * TC_ALIGNMENT);
  if (bytes->data == NULL) {
    close(handle);
    return tcr_no_memory(problem, size, path);
  }
  ssize_t got = 1;
  while (bytes->size < size && (got = read_some(handle, bytes->data + bytes->size, (size_t)size - bytes->size)) > 0)
    bytes->size += (size_t)got;
  int error = errno;
  close(handle);
  bytes->data[bytes->size] = 0;
  if (got >= 0) return TC_OK;
  free(bytes->data);
  memset(bytes, 0, sizeof *bytes);
  return tcr_fail(problem, TC_STORAGE, path, "", "cannot be read: %s", strerror(error));
}

/* Read, not mapped: a file that is cut off meanwhile gives another digest and no SIGBUS. */
int32_t tcr_hash_file(const char *path, const char *name, uint64_t size, const char *digest, tcr_problem *problem) {
  const char *colon = name[0] ? ": " : "";
  char found[TCR_DIGEST + 1];
  int handle;
  uint64_t got_size;
  int32_t status = open_regular(path, &handle, &got_size, problem);
  if (status != TC_OK) return status;
  size_t chunk = got_size < 65536 ? 4096 : 16384; /* a quarter of the level-1 cache or less; it counts in the peak */
  unsigned char *buffer = got_size == size ? malloc(chunk) : NULL;
  tcr_sha256 hash;
  ssize_t got = 0;
  tcr_sha256_start(&hash);
  while (buffer != NULL && (got = read_some(handle, buffer, chunk)) > 0) tcr_sha256_add(&hash, buffer, (size_t)got);
  int error = errno;
  close(handle);
  if (got_size != size)
    return tcr_damaged(problem, path, "%s%shas %llu bytes, expected %llu", name, colon, (unsigned long long)got_size,
                       (unsigned long long)size);
  if (buffer == NULL) return tcr_no_memory(problem, chunk, "reading a file");
  free(buffer);
  if (got < 0) return tcr_fail(problem, TC_STORAGE, path, "", "cannot be read: %s", strerror(error));
  tcr_sha256_end(&hash, found);
  if (strcmp(found, digest) != 0)
    return tcr_damaged(problem, path, "%s%scontent has digest %s, expected %s", name, colon, found, digest);
  return TC_OK;
}
