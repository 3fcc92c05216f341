/* What UDP sockets alone do between two processes of this machine, both spinning.
 *
 *   udp lat SIZE COUNT      half round trip of COUNT datagrams of SIZE bytes, median in us
 *   udp bw SIZE SECONDS     one way, GB/s (10^9): datagrams of SIZE bytes, 15 to a call (GSO, GRO), a window of 256 KiB
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/udp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SEGMENTS = 15, WINDOW = 256 << 10, ACKNOWLEDGE_EVERY = 64 << 10, PATIENCE = 10 };

static char buffer[1 << 16];

static void fail(const char *what) {
  perror(what);
  exit(1);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static int bound(struct sockaddr_in *address) {
  int s = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0), size = 4 << 20;
  socklen_t length = sizeof *address;
  *address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  if (s < 0 || bind(s, (struct sockaddr *)address, length) || getsockname(s, (struct sockaddr *)address, &length)) fail("bind");
  setsockopt(s, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
  return s;
}

static ssize_t receive(int s, struct sockaddr_in *from) {
  socklen_t length = sizeof *from;
  for (double end = now() + PATIENCE; now() < end;)
    for (int i = 0; i < 1000; i++) {
      ssize_t n = recvfrom(s, buffer, sizeof buffer, 0, (struct sockaddr *)from, &length);
      if (n >= 0) return n;
      if (errno != EAGAIN && errno != EINTR) fail("recvfrom");
    }
  errno = ETIMEDOUT;
  fail("no answer");
  return -1;
}

static void transmit(int s, const struct sockaddr_in *to, size_t size) {
  while (sendto(s, buffer, size, 0, (const struct sockaddr *)to, sizeof *to) < 0)
    if (errno != EAGAIN) fail("sendto");
}

static int by_value(const void *a, const void *b) {
  double d = *(const double *)a - *(const double *)b;
  return (d > 0) - (d < 0);
}

static void latency(int s, const struct sockaddr_in *peer, size_t size, int count) {
  double *times = calloc(count, sizeof *times);
  struct sockaddr_in from;
  if (!times) fail("calloc");
  for (int i = -count / 10; i < count; i++) {
    double begin = now();
    transmit(s, peer, size);
    receive(s, &from);
    if (i >= 0) times[i] = (now() - begin) / 2 * 1e6;
  }
  qsort(times, count, sizeof *times, by_value);
  printf("%.2f\n", times[count / 2]);
}

static void echo(int s) {
  struct sockaddr_in from;
  for (ssize_t n; (n = receive(s, &from)) > 0;) transmit(s, &from, n);
}

static void stream(int s, const struct sockaddr_in *peer, int size, double seconds) {
  uint64_t sent = 0, acknowledged = 0;
  struct sockaddr_in from;
  if (setsockopt(s, IPPROTO_UDP, UDP_SEGMENT, &size, sizeof size)) fail("UDP_SEGMENT");
  double begin = now(), end = begin + seconds;
  while (now() < end) {
    while (sent - acknowledged > WINDOW) {
      receive(s, &from);
      memcpy(&acknowledged, buffer, sizeof acknowledged);
    }
    transmit(s, peer, (size_t)size * SEGMENTS);
    sent += (uint64_t)size * SEGMENTS;
  }
  printf("%.2f\n", acknowledged / (now() - begin) / 1e9);
}

static void sink(int s) {
  uint64_t received = 0, acknowledged = 0;
  struct sockaddr_in from;
  int on = 1;
  if (setsockopt(s, IPPROTO_UDP, UDP_GRO, &on, sizeof on)) fail("UDP_GRO");
  for (ssize_t n; (n = receive(s, &from)) > 0;) {
    received += n;
    if (received - acknowledged >= ACKNOWLEDGE_EVERY) {
      memcpy(buffer, &received, sizeof received);
      transmit(s, &from, sizeof received);
      acknowledged = received;
    }
  }
}

int main(int count, char **arguments) {
  if (count != 4 || (strcmp(arguments[1], "lat") && strcmp(arguments[1], "bw"))) {
    fprintf(stderr, "usage: udp lat SIZE COUNT | udp bw SIZE SECONDS\n");
    return 2;
  }
  int is_latency = !strcmp(arguments[1], "lat"), size = atoi(arguments[2]);
  struct sockaddr_in here, there;
  int near = bound(&here), far = bound(&there);
  pid_t child = fork();
  if (child < 0) fail("fork");
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(near);
    is_latency ? echo(far) : sink(far);
    return 0;
  }
  close(far);
  is_latency ? latency(near, &there, size, atoi(arguments[3])) : stream(near, &there, size, atof(arguments[3]));
  fflush(stdout);
  kill(child, SIGKILL);
  waitpid(child, NULL, 0);
  return 0;
}
