/*
 * Writes a disk so that anybody can tell afterwards what it must hold, and checks that it does.
 *
 * Operation N is a pure function of (seed, N, size), so no log is needed: the checker repeats the sequence
 * and asks every sector which operation wrote it. The same static program runs in the guest and on the host.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    SECTOR = 512,
    LONGEST = 128,    /* sectors in the longest operation: 64 KiB, a cluster of qcow2 */
    WORKERS = 16,     /* operations in flight */
    WINDOW = 512,     /* operations issued and not acknowledged; the checker relies on it */
    FLUSH_MS = 50,    /* usual pause between flushes, and so between acknowledgements */
    SHOWN = 20,       /* bad sectors that the checker describes; it counts them all */
};

static const uint64_t MAGIC = 0x726f746365732d71; /* "q-sector" on disk */
static const uint64_t GOLDEN = 0x9e3779b97f4a7c15;

struct sector {
    uint64_t magic, seed, operation, number, payload[59], checksum;
};
_Static_assert(sizeof(struct sector) == SECTOR, "a sector is a sector");

enum kind { WRITE, ZERO, DISCARD };
static const char *const kinds[] = { "write", "write zeroes", "discard" };

struct operation {
    enum kind kind;
    uint64_t first, count; /* sectors */
};

struct disk {
    const char *path;
    int fd;
    bool block; /* a block device, not a file in a file system */
    uint64_t seed, sectors;
};

static _Noreturn void fail(const char *path, const char *what)
{
    dprintf(STDOUT_FILENO, "%s failed %s: %s\n", path, what, strerror(errno));
    _exit(3);
}

static uint64_t mix(uint64_t x) /* the finalizer of splitmix64 */
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

/* Ten operations are eight writes, a write zeroes and a discard; half of the last two take a whole cluster,
 * because qcow2 ignores a discard of less. */
static struct operation operation(const struct disk *disk, uint64_t number)
{
    uint64_t dice = mix(disk->seed ^ mix(number * GOLDEN)), more = mix(dice + GOLDEN), place = mix(more + GOLDEN);
    struct operation op = { .kind = dice % 10 < 8 ? WRITE : dice % 10 == 8 ? ZERO : DISCARD };

    if (op.kind != WRITE && more % 2) {
        op.count = LONGEST;
        op.first = place % (disk->sectors / LONGEST) * LONGEST;
    } else {
        op.count = 1 + (more >> 8) % (1 << (more >> 4) % 8);
        op.first = place % (disk->sectors - op.count + 1);
    }
    return op;
}

static bool covers(struct operation op, uint64_t sector)
{
    return op.first <= sector && sector < op.first + op.count;
}

static uint64_t checksum(const struct sector *sector)
{
    const uint64_t *words = (const uint64_t *)sector;
    uint64_t sum = MAGIC;

    for (size_t i = 0; i < SECTOR / sizeof *words - 1; i++)
        sum = ((sum ^ words[i]) * GOLDEN) ^ sum >> 29;
    return sum;
}

static void fill(struct sector *sector, uint64_t seed, uint64_t number, uint64_t place)
{
    uint64_t word = mix(seed ^ mix(number) ^ place);

    *sector = (struct sector){ MAGIC, seed, number, place, { 0 }, 0 };
    for (size_t i = 0; i < sizeof sector->payload / sizeof *sector->payload; i++)
        sector->payload[i] = word += GOLDEN;
    sector->checksum = checksum(sector);
}

/* ---- writer ---- */

static struct {
    struct disk disk;
    pthread_mutex_t turn; /* held by the one worker that waits for the next operation to be due */
    struct timespec due;
    uint64_t pause_ns;
    pthread_mutex_t lock; /* guards all that follows */
    pthread_cond_t changed;
    uint64_t next, last, acknowledged, slowest_ns;
    uint64_t held[WORKERS]; /* the operation of each worker, or 0 */
    int workers;
} writer = { .turn = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER };

static volatile sig_atomic_t stopping;

static void stop(int signal)
{
    stopping = signal;
}

static int perform(const struct disk *disk, uint64_t number, struct operation op, struct sector *buffer)
{
    uint64_t range[2] = { op.first * SECTOR, op.count * SECTOR };

    if (op.kind == WRITE) {
        for (uint64_t i = 0; i < op.count; i++)
            fill(&buffer[i], disk->seed, number, op.first + i);
        errno = EIO; /* for a short write */
        return pwrite(disk->fd, buffer, range[1], range[0]) == (ssize_t)range[1] ? 0 : -1;
    }
    if (!disk->block)
        return fallocate(disk->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, range[0], range[1]);
    if (op.kind == ZERO)
        return ioctl(disk->fd, BLKZEROOUT, range);
    /* A discard is a hint, and a disk that takes none is fine. */
    return ioctl(disk->fd, BLKDISCARD, range) == 0 || errno == EOPNOTSUPP ? 0 : -1;
}

static bool overlaps_earlier(uint64_t number)
{
    struct operation mine = operation(&writer.disk, number);

    for (int i = 0; i < WORKERS; i++) {
        if (writer.held[i] == 0 || writer.held[i] >= number)
            continue;
        struct operation other = operation(&writer.disk, writer.held[i]);
        if (covers(mine, other.first) || covers(other, mine.first))
            return true;
    }
    return false;
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * UINT64_C(1000000000) + now.tv_nsec;
}

static void wait_until_due(void)
{
    struct timespec now;

    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &writer.due, NULL);
    clock_gettime(CLOCK_MONOTONIC, &now); /* from now on: after a pause of the guest there is no rush to catch up */
    uint64_t ns = now.tv_nsec + writer.pause_ns;
    writer.due = (struct timespec){ now.tv_sec + ns / 1000000000, ns % 1000000000 };
}

/* The next operation for this worker, once nothing earlier that overlaps it is in flight; 0 at the end. */
static uint64_t take(int worker)
{
    pthread_mutex_lock(&writer.turn);
    wait_until_due();
    pthread_mutex_lock(&writer.lock);
    while (!stopping && writer.next <= writer.last && writer.next > writer.acknowledged + WINDOW)
        pthread_cond_wait(&writer.changed, &writer.lock);
    uint64_t number = stopping || writer.next > writer.last ? 0 : writer.next++;
    writer.held[worker] = number;
    pthread_mutex_unlock(&writer.turn);
    while (number && overlaps_earlier(number))
        pthread_cond_wait(&writer.changed, &writer.lock);
    pthread_mutex_unlock(&writer.lock);
    return number;
}

static void *work(void *argument)
{
    int worker = (int)(intptr_t)argument;
    struct sector *buffer = aligned_alloc(4096, LONGEST * SECTOR);

    for (uint64_t number; (number = take(worker)) != 0;) {
        struct operation op = operation(&writer.disk, number);
        uint64_t begun = now_ns();
        if (perform(&writer.disk, number, op, buffer) != 0)
            fail(writer.disk.path, kinds[op.kind]);
        uint64_t took = now_ns() - begun;
        pthread_mutex_lock(&writer.lock);
        if (took > writer.slowest_ns)
            writer.slowest_ns = took;
        writer.held[worker] = 0;
        pthread_cond_broadcast(&writer.changed);
        pthread_mutex_unlock(&writer.lock);
    }
    pthread_mutex_lock(&writer.lock);
    writer.workers--;
    pthread_mutex_unlock(&writer.lock);
    return NULL;
}

/* All operations up to this one have completed. */
static uint64_t completed(void)
{
    uint64_t number = writer.next - 1;

    for (int i = 0; i < WORKERS; i++)
        if (writer.held[i] && writer.held[i] <= number)
            number = writer.held[i] - 1;
    return number;
}

static int run(struct disk disk, uint64_t first, uint64_t last, double rate, uint64_t flush_ms)
{
    const struct timespec pause = { flush_ms / 1000, flush_ms % 1000 * 1000000 };
    bool finished = false;

    writer.disk = disk;
    writer.next = first;
    writer.last = last;
    writer.acknowledged = first - 1;
    writer.pause_ns = rate > 0 ? 1e9 / rate : 0;
    signal(SIGTERM, stop);
    signal(SIGINT, stop);
    for (intptr_t i = 0; i < WORKERS; i++) {
        pthread_t thread;
        writer.workers++;
        if ((errno = pthread_create(&thread, NULL, work, (void *)i)) != 0)
            fail(disk.path, "thread");
    }
    while (!finished) {
        nanosleep(&pause, NULL);
        pthread_mutex_lock(&writer.lock);
        uint64_t number = completed(), slowest_us = writer.slowest_ns / 1000;
        writer.slowest_ns = 0;
        finished = writer.workers == 0;
        pthread_mutex_unlock(&writer.lock);
        if (fsync(disk.fd) != 0)
            fail(disk.path, "flush");
        if (number > writer.acknowledged)
            dprintf(STDOUT_FILENO, "%s %" PRIu64 " %" PRIu64 "\n", disk.path, number, slowest_us);
        pthread_mutex_lock(&writer.lock);
        writer.acknowledged = number;
        pthread_cond_broadcast(&writer.changed);
        pthread_mutex_unlock(&writer.lock);
    }
    close(disk.fd); /* before we say so: the next one opens it exclusively */
    dprintf(STDOUT_FILENO, "%s stopped %" PRIu64 "\n", disk.path, writer.acknowledged);
    return 0;
}

/* ---- checker ---- */

enum fault { LOST, TORN, MISPLACED, FOREIGN, FAULTS };
static const char *const faults[] = { "lost", "torn", "misplaced", "foreign" };
static uint64_t counts[FAULTS];

static const uint64_t BAD = UINT64_MAX; /* a sector that was reported already */

static uint64_t report(enum fault fault, uint64_t sector, const char *why)
{
    if (counts[LOST] + counts[TORN] + counts[MISPLACED] + counts[FOREIGN] < SHOWN)
        printf("%s: sector %" PRIu64 ": %s\n", faults[fault], sector, why);
    counts[fault]++;
    return BAD;
}

/* Which operation wrote the sector that was read at this place: 0 for zeroes, BAD where none can have. */
static uint64_t author(const struct disk *disk, const struct sector *sector, uint64_t place)
{
    static const struct sector zeroes;
    char why[128];

    if (memcmp(sector, &zeroes, SECTOR) == 0)
        return 0;
    if (sector->checksum != checksum(sector))
        return sector->magic == MAGIC || sector->seed == disk->seed
            ? report(TORN, place, "the checksum is wrong")
            : report(FOREIGN, place, "not written by this writer");
    if (sector->magic != MAGIC || sector->seed != disk->seed)
        return report(FOREIGN, place, "written with another seed");
    struct operation op = operation(disk, sector->operation);
    if (sector->number == place && op.kind == WRITE && covers(op, place))
        return sector->operation;
    snprintf(why, sizeof why, "holds sector %" PRIu64 " of operation %" PRIu64, sector->number, sector->operation);
    return report(MISPLACED, place, why);
}

static uint64_t *read_authors(const struct disk *disk)
{
    enum { CHUNK = 2048 };
    uint64_t *authors = calloc(disk->sectors, sizeof *authors);
    struct sector *buffer = aligned_alloc(4096, CHUNK * SECTOR);

    for (uint64_t first = 0; first < disk->sectors; first += CHUNK) {
        uint64_t count = disk->sectors - first < CHUNK ? disk->sectors - first : CHUNK;
        errno = EIO; /* for a short read */
        if (pread(disk->fd, buffer, count * SECTOR, first * SECTOR) != (ssize_t)(count * SECTOR))
            fail(disk->path, "read");
        for (uint64_t i = 0; i < count; i++)
            authors[first + i] = author(disk, &buffer[i], first + i);
    }
    free(buffer);
    return authors;
}

/* What each sector must hold: operation `wanted` or a later one; zeroes where `zeroable`. After a discard both the
 * old data and zeroes are right. */
struct promise {
    uint64_t wanted;
    bool zeroable;
};

static struct promise *promises(const struct disk *disk, uint64_t acknowledged, uint64_t issued)
{
    struct promise *sectors = calloc(disk->sectors, sizeof *sectors);

    for (uint64_t i = 0; i < disk->sectors; i++)
        sectors[i].zeroable = true;
    for (uint64_t number = 1; number <= issued; number++) {
        struct operation op = operation(disk, number);
        for (uint64_t i = op.first; i < op.first + op.count; i++) {
            if (number <= acknowledged && op.kind != DISCARD)
                sectors[i].wanted = number;
            if (op.kind != WRITE)
                sectors[i].zeroable = true;
            else if (number <= acknowledged)
                sectors[i].zeroable = false;
        }
    }
    return sectors;
}

static int check(struct disk disk, uint64_t acknowledged, uint64_t issued)
{
    uint64_t *found = read_authors(&disk), newest = 0;

    for (uint64_t i = 0; i < disk.sectors; i++)
        if (found[i] != BAD && found[i] > newest)
            newest = found[i];
    /* The writer is never more than a window ahead of what it acknowledged, whether or not we heard of it. */
    uint64_t floor = newest > acknowledged + WINDOW ? newest - WINDOW : acknowledged;
    if (issued == 0)
        issued = (newest > acknowledged ? newest : acknowledged) + WINDOW;

    struct promise *sectors = promises(&disk, floor, issued);
    for (uint64_t i = 0; i < disk.sectors; i++) {
        char why[128];
        if (found[i] == BAD || (found[i] == 0 ? sectors[i].zeroable : found[i] >= sectors[i].wanted && found[i] <= issued))
            continue;
        snprintf(why, sizeof why, "operation %" PRIu64 " acknowledged, operation %" PRIu64 " found%s",
                 sectors[i].wanted, found[i], found[i] ? "" : " (zeroes)");
        report(found[i] > issued ? FOREIGN : LOST, i, why);
    }
    printf("%s: %" PRIu64 " sectors, %" PRIu64 " operations acknowledged, newest found %" PRIu64, disk.path, disk.sectors,
           acknowledged, newest);
    for (int i = 0; i < FAULTS; i++)
        printf("%s %" PRIu64 " %s", i ? "," : ":", counts[i], faults[i]);
    printf("\n");
    return counts[LOST] + counts[TORN] + counts[MISPLACED] + counts[FOREIGN] ? 1 : 0;
}

/* ---- command line ---- */

static const char usage[] =
    "usage: writer run [-r OPERATIONS_A_SECOND] [-p MS] [-f FIRST] [-l LAST] [-s BYTES] DISK SEED\n"
    "       writer check [-i ISSUED] [-s BYTES] DISK SEED ACKNOWLEDGED\n"
    "\n"
    "run writes to DISK, a block device or a file, until operation LAST or SIGTERM. It prints `DISK N US` when\n"
    "all operations up to N have completed and a flush after them has returned, US being the microseconds that the\n"
    "slowest one since the last such line took, and `DISK stopped N` at the end. -p is the pause between flushes.\n"
    "\n"
    "check reads all of DISK and says which sectors are lost (older than an acknowledged operation), torn (damaged),\n"
    "misplaced, or foreign. Operations after ACKNOWLEDGED may or may not have happened, up to ISSUED if it is given.\n"
    "-s is the size of the disk when the writer ran, where it has another one now.\n"
    "\n"
    "Exit status: 0 all is well, 1 bad sectors, 2 usage, 3 an I/O error.\n";

static struct disk open_disk(const char *path, const char *seed, bool writing, uint64_t bytes)
{
    struct disk disk = { .path = path, .seed = strtoull(seed, NULL, 0) };
    struct stat status;

    if (stat(path, &status) != 0)
        fail(path, "stat");
    disk.block = S_ISBLK(status.st_mode);
    /* Only a device is opened O_DIRECT: not every file system has it. O_EXCL refuses a device that is mounted. */
    disk.fd = open(path, (writing ? O_RDWR : O_RDONLY) | O_CLOEXEC | (disk.block ? O_DIRECT | O_EXCL : 0));
    if (disk.fd < 0)
        fail(path, "open");
    off_t size = lseek(disk.fd, 0, SEEK_END);
    errno = ERANGE;
    if ((uint64_t)size < bytes || (disk.sectors = (bytes ? bytes : (uint64_t)size) / SECTOR) < LONGEST)
        fail(path, "size");
    return disk;
}

int main(int argc, char **argv)
{
    uint64_t first = 1, last = UINT64_MAX - 1, issued = 0, bytes = 0;
    uint64_t flush_ms = FLUSH_MS;
    double rate = 0;
    const char *verb = argc > 1 ? argv[1] : "";

    if (strcmp(verb, "--help") == 0)
        return fputs(usage, stdout) < 0;
    for (int option; (option = getopt(argc - 1, argv + 1, "r:p:f:l:i:s:")) != -1;)
        switch (option) {
        case 'r': rate = strtod(optarg, NULL); break;
        case 'p': flush_ms = strtoull(optarg, NULL, 0); break;
        case 'f': first = strtoull(optarg, NULL, 0); break;
        case 'l': last = strtoull(optarg, NULL, 0); break;
        case 'i': issued = strtoull(optarg, NULL, 0); break;
        case 's': bytes = strtoull(optarg, NULL, 0); break;
        default: goto wrong;
        }
    char **words = argv + 1 + optind;
    int count = argc - 1 - optind;
    if (strcmp(verb, "run") == 0 && count == 2)
        return run(open_disk(words[0], words[1], true, bytes), first, last, rate, flush_ms);
    if (strcmp(verb, "check") == 0 && count == 3)
        return check(open_disk(words[0], words[1], false, bytes), strtoull(words[2], NULL, 0), issued);
wrong:
    fputs(usage, stderr);
    return 2;
}
