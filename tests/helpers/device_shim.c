/* Makes the processes that it is preloaded into take this machine for another one, as far as an SSH session sees it:
 * programs for another architecture are run by QEMU (as binfmt_misc would, which needs root rights), and uname and
 * /proc/cpuinfo are those of the emulated machine.  For sshd it invents the user that it separates privileges with.
 *
 * DEVICE_QEMU: QEMU's program, its CPU and its root, separated by '|'.  DEVICE_CPUINFO, DEVICE_ARCH: what is shown. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pwd.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int is_aarch64(const char *path) {
  unsigned char head[20];
  int file = REAL(open)(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  ssize_t got = read(file, head, sizeof head);
  close(file);
  return got == sizeof head && memcmp(head, "\177ELF", 4) == 0 && head[18] == 183 && head[19] == 0;
}

int execve(const char *path, char *const arguments[], char *const environment[]) {
  const char *qemu = getenv("DEVICE_QEMU");
  /* What may not be executed isn't, whoever would run it. */
  if (qemu == NULL || access(path, X_OK) != 0 || !is_aarch64(path)) return REAL(execve)(path, arguments, environment);
  char *copy = strdup(qemu), *program = strtok(copy, "|"), *cpu = strtok(NULL, "|"), *root = strtok(NULL, "|");
  int count = 0;
  while (arguments[count] != NULL) count++;
  char *command[count + 12];
  int at = 0;
  command[at++] = program;
  command[at++] = "-cpu";
  command[at++] = cpu;
  command[at++] = "-L";
  command[at++] = root;
  command[at++] = "-U";
  command[at++] = "LD_PRELOAD";
  command[at++] = (char *)path;
  for (int i = 1; i < count; i++) command[at++] = arguments[i];
  command[at] = NULL;
  return REAL(execve)(program, command, environment);
}

static const char *shown(const char *path) {
  const char *cpuinfo = getenv("DEVICE_CPUINFO");
  return cpuinfo != NULL && strcmp(path, "/proc/cpuinfo") == 0 ? cpuinfo : path;
}

int open(const char *path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return REAL(open)(shown(path), flags, mode);
}

int open64(const char *path, int flags, ...) __attribute__((alias("open")));

int openat(int folder, const char *path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return REAL(openat)(folder, shown(path), flags, mode);
}

int openat64(int folder, const char *path, int flags, ...) __attribute__((alias("openat")));

int uname(struct utsname *name) {
  int status = REAL(uname)(name);
  const char *arch = getenv("DEVICE_ARCH");
  if (status == 0 && arch != NULL) snprintf(name->machine, sizeof name->machine, "%s", arch);
  return status;
}

struct passwd *getpwnam(const char *name) {
  struct passwd *found = REAL(getpwnam)(name);
  return found == NULL && strcmp(name, "sshd") == 0 ? REAL(getpwnam)("nobody") : found;
}
