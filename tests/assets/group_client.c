/*
 * A client of VFIO in the five ways there are to an address space, as C programs are: written against
 * the kernel's headers only (include/uapi/linux/vfio.h and iommufd.h), with /dev and /sys compiled in.
 * Prints a line for each check and ends at the first one that fails, with its place.
 *
 *	group_client MODE HOW UUID OTHER
 *
 * MODE is type1 or type1v2 (a group and /dev/vfio/vfio), compat or compatv2 (a group and /dev/iommu),
 * or native (/dev/vfio/devices/vfioN and /dev/iommu). UUID is an mtty's, OTHER one of another group.
 * HOW: "plain"; "threads": another thread opens, a third one uses; "storm": a signal every 100 us;
 * "orders": closes in every order; "fork": a child goes on when its parent has ended; "killed":
 * children die at any moment; "wrong": mistakes.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/iommufd.h>
#include <linux/vfio.h>

static void fail(int line, const char *what, long result, int error)
{
	fflush(stdout);
	fprintf(stderr, "%s:%d: FAILED: %s: %ld, %s\n", __FILE__, line, what, result,
		error ? strerrorname_np(error) : "no errno");
	_exit(1);
}

static long must(int line, const char *what, long result, int error)
{
	if (result < 0)
		fail(line, what, result, error);
	printf("ok %d: %s\n", line, what);
	return result;
}

static void check(int line, const char *what, long holds)
{
	if (!holds)
		fail(line, what, holds, 0);
	printf("ok %d: %s\n", line, what);
}

static void fails(int line, const char *what, int want, long result, int error)
{
	if (result != -1 || error != want)
		fail(line, what, result, result == -1 ? error : 0);
	printf("ok %d: %s is %s\n", line, what, strerrorname_np(want));
}

/* errno is read after the call: arguments have no order among themselves. */
#define CHECK(x) check(__LINE__, #x, (x))
#define MUST(x) ({ long r_ = (long)(x); must(__LINE__, #x, r_, errno); })
#define FAILS(want, x) ({ long r_ = (long)(x); fails(__LINE__, #x, want, r_, errno); })

static const char *mode, *uuid;
static char group_node[64], device_node[300];
static int native, compat, v1;
static void *memory;
static long page;
#define PAGES 64
#define IOVA 0x100000

struct session {
	int space;	/* the container, or the iommufd */
	int group;	/* -1: native */
	int device;
	__u32 ioas;
};

/* Where sysfs says the nodes are. */
static void find_nodes(const char *name, char *group, char *device)
{
	char path[300], link[300];
	struct dirent *entry;
	ssize_t length;
	DIR *dir;

	snprintf(path, sizeof(path), "/sys/bus/mdev/devices/%s/iommu_group", name);
	MUST(length = readlink(path, link, sizeof(link) - 1));
	link[length] = 0;
	sprintf(group, "/dev/vfio/%s", strrchr(link, '/') + 1);
	if (!device)
		return;
	snprintf(path, sizeof(path), "/sys/bus/mdev/devices/%s/vfio-dev", name);
	CHECK((dir = opendir(path)) != NULL);
	while ((entry = readdir(dir)))
		if (!strncmp(entry->d_name, "vfio", 4))
			snprintf(device, 300, "/dev/vfio/devices/%s", entry->d_name);
	closedir(dir);
}

/* A group can be had by one file. Another's close is heard of after it has returned. */
static int open_patiently(const char *path)
{
	int n, fd = -1;

	for (n = 0; n < 5000 && (fd = open(path, O_RDWR | O_CLOEXEC)) < 0 && errno == EBUSY; n++)
		usleep(1000);
	return fd;
}

static int map(struct session *s, int flags, __u64 iova, __u64 size)
{
	if (native) {
		struct iommu_ioas_map map = {
			.size = sizeof(map), .flags = IOMMU_IOAS_MAP_FIXED_IOVA | flags << 1, .ioas_id = s->ioas,
			.user_va = (uintptr_t)memory, .length = size, .iova = iova,
		};
		return ioctl(s->space, IOMMU_IOAS_MAP, &map);
	}
	struct vfio_iommu_type1_dma_map map = {
		.argsz = sizeof(map), .flags = flags, .vaddr = (uintptr_t)memory, .iova = iova, .size = size,
	};
	return ioctl(s->space, VFIO_IOMMU_MAP_DMA, &map);
}

static long unmap(struct session *s, __u64 iova, __u64 size)
{
	if (native) {
		struct iommu_ioas_unmap unmap = {
			.size = sizeof(unmap), .ioas_id = s->ioas, .iova = iova, .length = size,
		};
		return ioctl(s->space, IOMMU_IOAS_UNMAP, &unmap) ? -1 : (long)unmap.length;
	}
	struct vfio_iommu_type1_dma_unmap unmap = { .argsz = sizeof(unmap), .iova = iova, .size = size };
	return ioctl(s->space, VFIO_IOMMU_UNMAP_DMA, &unmap) ? -1 : (long)unmap.size;
}

#define READ_WRITE (VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE)

/* Everything before the device: the address space with memory in it. */
static void open_space(struct session *s)
{
	MUST(s->space = open(native || compat ? "/dev/iommu" : "/dev/vfio/vfio", O_RDWR | O_CLOEXEC));
	s->group = -1;
	if (native) {
		struct iommu_ioas_alloc alloc = { .size = sizeof(alloc) };

		MUST(ioctl(s->space, IOMMU_IOAS_ALLOC, &alloc));
		s->ioas = alloc.out_ioas_id;
	} else {
		struct vfio_group_status status = { .argsz = sizeof(status) };
		int kind = v1 ? VFIO_TYPE1_IOMMU : VFIO_TYPE1v2_IOMMU;

		MUST(s->group = open_patiently(group_node));
		MUST(ioctl(s->group, VFIO_GROUP_GET_STATUS, &status));
		CHECK(status.flags == VFIO_GROUP_FLAGS_VIABLE);
		CHECK(ioctl(s->space, VFIO_GET_API_VERSION) == VFIO_API_VERSION);
		MUST(ioctl(s->group, VFIO_GROUP_SET_CONTAINER, &s->space));
		CHECK(ioctl(s->space, VFIO_CHECK_EXTENSION, kind) == 1);
		MUST(ioctl(s->space, VFIO_SET_IOMMU, kind));
		MUST(ioctl(s->group, VFIO_GROUP_GET_STATUS, &status));
		CHECK(status.flags == (VFIO_GROUP_FLAGS_VIABLE | VFIO_GROUP_FLAGS_CONTAINER_SET));
	}
	MUST(map(s, READ_WRITE, IOVA, PAGES * page));
}

static void get_device(struct session *s)
{
	if (native) {
		struct vfio_device_bind_iommufd bind = { .argsz = sizeof(bind), .iommufd = s->space };
		struct vfio_device_attach_iommufd_pt attach = { .argsz = sizeof(attach), .pt_id = s->ioas };

		MUST(s->device = open(device_node, O_RDWR | O_CLOEXEC));
		MUST(ioctl(s->device, VFIO_DEVICE_BIND_IOMMUFD, &bind));
		MUST(ioctl(s->device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach));
	} else {
		MUST(s->device = ioctl(s->group, VFIO_GROUP_GET_DEVICE_FD, uuid));
		CHECK(fcntl(s->device, F_GETFD) == FD_CLOEXEC);
	}
}

static unsigned region_offset(struct session *s, int index, __u64 *offset)
{
	struct vfio_region_info info = { .argsz = sizeof(info), .index = index };

	MUST(ioctl(s->device, VFIO_DEVICE_GET_REGION_INFO, &info));
	*offset = info.offset;
	return info.size;
}

static void out(struct session *s, __u64 at, unsigned char byte)
{
	MUST(pwrite(s->device, &byte, 1, at) == 1 ? 0 : -1);
}

static int set_intx(struct session *s, int fd)
{
	char bytes[sizeof(struct vfio_irq_set) + sizeof(int)] __attribute__((aligned(8)));
	struct vfio_irq_set *set = (void *)bytes;

	*set = (struct vfio_irq_set) {
		.argsz = sizeof(bytes), .index = VFIO_PCI_INTX_IRQ_INDEX, .count = fd >= 0,
		.flags = VFIO_IRQ_SET_ACTION_TRIGGER | (fd >= 0 ? VFIO_IRQ_SET_DATA_EVENTFD : VFIO_IRQ_SET_DATA_NONE),
	};
	memcpy(set->data, &fd, sizeof(fd));
	return ioctl(s->device, VFIO_DEVICE_SET_IRQS, set);
}

/* Reads the card's name, sends it a byte, which it gives back, and hears of it by interrupt. */
static void use(struct session *s)
{
	struct vfio_device_info info = { .argsz = sizeof(info) };
	__u64 config, port, count = 0;
	unsigned char byte = 0;
	struct pollfd wait;
	__u32 id = 0;
	int event, ready;

	MUST(ioctl(s->device, VFIO_DEVICE_GET_INFO, &info));
	CHECK(info.flags == (VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET));
	MUST(ioctl(s->device, VFIO_DEVICE_RESET));
	region_offset(s, VFIO_PCI_CONFIG_REGION_INDEX, &config);
	CHECK(region_offset(s, VFIO_PCI_BAR0_REGION_INDEX, &port) == 8);
	CHECK(pread(s->device, &id, 4, config) == 4 && id == 0x32534348);
	MUST(event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
	MUST(set_intx(s, event));
	/* Words of eight bits, interrupts let through, one for each byte received. */
	out(s, port + 3, 3);
	out(s, port + 4, 8);
	out(s, port + 1, 1);
	out(s, port, 'V');
	wait = (struct pollfd) { .fd = event, .events = POLLIN };
	while ((ready = poll(&wait, 1, 20000)) < 0 && errno == EINTR)
		;
	CHECK(ready == 1 && read(event, &count, 8) == 8 && count == 1);
	CHECK(pread(s->device, &byte, 1, port) == 1 && byte == 'V');
	MUST(set_intx(s, -1));
	close(event);
}

static void close_all(struct session *s)
{
	MUST(close(s->device));
	CHECK(unmap(s, IOVA, PAGES * page) == PAGES * page);
	if (s->group >= 0)
		MUST(close(s->group));
	MUST(close(s->space));
}

/* What distinguishes the modes: splitting a mapping. */
static void partial_unmap(struct session *s)
{
	if (native) {
		FAILS(ENOENT, unmap(s, IOVA, page));
	} else if (compat && !v1) {
		FAILS(ENOENT, unmap(s, IOVA, page));
	} else if (compat) {
		CHECK(unmap(s, IOVA + page, page) == page);
		MUST(map(s, READ_WRITE, IOVA + page, page));
	} else if (v1) {
		CHECK(unmap(s, IOVA + page, page) == 0);
	} else {
		FAILS(EINVAL, unmap(s, IOVA, page));
	}
	FAILS(EEXIST, map(s, READ_WRITE, IOVA, page));
}

static void plain(void)
{
	struct session s;

	open_space(&s);
	get_device(&s);
	use(&s);
	partial_unmap(&s);
	if (!native) {
		int again;

		FAILS(EBUSY, open(group_node, O_RDWR));
		FAILS(EBUSY, open(group_node, O_RDONLY));
		MUST(again = ioctl(s.group, VFIO_GROUP_GET_DEVICE_FD, uuid));
		MUST(close(again));
		if (compat) {
			/* iommufd lets go of a group whose device is open (vfio_group_ioctl_unset_container). */
			MUST(ioctl(s.group, VFIO_GROUP_UNSET_CONTAINER));
			FAILS(EINVAL, ioctl(s.group, VFIO_GROUP_GET_DEVICE_FD, uuid));
			use(&s);
		} else {
			FAILS(EBUSY, ioctl(s.group, VFIO_GROUP_UNSET_CONTAINER));
		}
	}
	close_all(&s);
}

static void *opener(void *arg)
{
	open_space(arg);
	get_device(arg);
	return NULL;
}

static void *user(void *arg)
{
	use(arg);
	return NULL;
}

static void threads(void)
{
	struct session s;
	pthread_t thread;

	CHECK(!pthread_create(&thread, NULL, opener, &s));
	CHECK(!pthread_join(thread, NULL));
	CHECK(!pthread_create(&thread, NULL, user, &s));
	CHECK(!pthread_join(thread, NULL));
	close_all(&s);
}

static volatile long signals;

static void count_signal(int signal)
{
	(void)signal;
	signals++;
}

static int descriptors(void)
{
	struct dirent *entry;
	int count = 0;
	DIR *dir = opendir("/proc/self/fd");

	while ((entry = readdir(dir)))
		count++;
	closedir(dir);
	return count;
}

/* As run-times with preemption by signal are, only faster. */
static void storm(void)
{
	struct sigaction action = { .sa_handler = count_signal, .sa_flags = SA_RESTART };
	struct itimerval often = { { 0, 100 }, { 0, 100 } }, never = { { 0, 0 }, { 0, 0 } };
	struct session s;
	int before, n;

	MUST(sigaction(SIGALRM, &action, NULL));
	MUST(setitimer(ITIMER_REAL, &often, NULL));
	for (n = 0; n < 20; n++) {
		open_space(&s);
		before = descriptors();
		get_device(&s);
		CHECK(descriptors() == before + 1);
		use(&s);
		close_all(&s);
	}
	MUST(setitimer(ITIMER_REAL, &never, NULL));
	CHECK(signals > 0);
}

static void works(struct session *s)
{
	__u64 config;
	__u32 id = 0;

	region_offset(s, VFIO_PCI_CONFIG_REGION_INDEX, &config);
	CHECK(pread(s->device, &id, 4, config) == 4 && id == 0x32534348);
}

static void orders(void)
{
	static const char *const all[] = { "csg", "cgs", "scg", "sgc", "gcs", "gsc" };
	struct session s;
	unsigned n;
	const char *at;

	/* c the device, s the address space, g the group. */
	for (n = 0; n < 6; n++) {
		printf("-- closed in the order %s\n", all[n]);
		open_space(&s);
		get_device(&s);
		for (at = all[n]; *at; at++) {
			if (*at == 'c') {
				works(&s);
				MUST(close(s.device));
			} else if (*at == 's') {
				MUST(close(s.space));
			} else if (s.group >= 0) {
				MUST(close(s.group));
			}
		}
	}
	/* The last of them has left nothing. */
	plain();
}

static void forked(void)
{
	struct session s;
	int alive[2];
	char byte;

	open_space(&s);
	MUST(pipe(alive));
	if (MUST(fork())) {
		printf("the parent ends\n");
		fflush(stdout);
		_exit(0);
	}
	MUST(close(alive[1]));
	/* Ends with the parent. */
	CHECK(read(alive[0], &byte, 1) == 0);
	if (!native)
		FAILS(EBUSY, open(group_node, O_RDWR));
	get_device(&s);
	use(&s);
	close_all(&s);
}

static void killed(void)
{
	struct session s;
	unsigned n;
	int status;
	pid_t pid;

	for (n = 0; n < 40; n++) {
		MUST(pid = fork());
		if (!pid) {
			fclose(stdout);
			stdout = fopen("/dev/null", "w");
			for (;;) {
				open_space(&s);
				get_device(&s);
				MUST(close(s.device));
				if (s.group >= 0)
					MUST(close(s.group));
				MUST(close(s.space));
			}
		}
		usleep(500 + 731 * n % 5000);
		MUST(kill(pid, SIGKILL));
		CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	}
	plain();
}

static void wrong(const char *other)
{
	char name[8192], other_node[64];
	struct vfio_group_status status = { .argsz = sizeof(status) };
	int group, container, other_group, none = -1, file;
	struct session s;

	find_nodes(other, other_node, NULL);
	CHECK(strcmp(other_node, group_node));
	MUST(group = open_patiently(group_node));
	/* The name comes first. */
	FAILS(ENODEV, ioctl(group, VFIO_GROUP_GET_DEVICE_FD, other));
	FAILS(ENODEV, ioctl(group, VFIO_GROUP_GET_DEVICE_FD, ""));
	FAILS(EFAULT, ioctl(group, VFIO_GROUP_GET_DEVICE_FD, NULL));
	memset(name, 'x', sizeof(name));
	FAILS(EINVAL, ioctl(group, VFIO_GROUP_GET_DEVICE_FD, name));
	snprintf(name, sizeof(name), "%s ", uuid);
	FAILS(ENODEV, ioctl(group, VFIO_GROUP_GET_DEVICE_FD, name));
	name[strlen(uuid) - 1] = 0;
	FAILS(ENODEV, ioctl(group, VFIO_GROUP_GET_DEVICE_FD, name));
	FAILS(EINVAL, ioctl(group, VFIO_GROUP_GET_DEVICE_FD, uuid));
	FAILS(EFAULT, ioctl(group, VFIO_GROUP_SET_CONTAINER, NULL));
	FAILS(EBADF, ioctl(group, VFIO_GROUP_SET_CONTAINER, &none));
	MUST(file = open("/dev/null", O_RDWR));
	FAILS(EBADFD, ioctl(group, VFIO_GROUP_SET_CONTAINER, &file));
	FAILS(EBADFD, ioctl(group, VFIO_GROUP_SET_CONTAINER, &group));
	FAILS(EINVAL, ioctl(group, VFIO_GROUP_UNSET_CONTAINER));
	MUST(container = open("/dev/vfio/vfio", O_RDWR));
	FAILS(EINVAL, ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU));
	MUST(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container));
	FAILS(EINVAL, ioctl(group, VFIO_GROUP_SET_CONTAINER, &container));
	FAILS(EINVAL, ioctl(group, VFIO_GROUP_GET_DEVICE_FD, uuid));
	FAILS(ENODEV, ioctl(group, VFIO_GROUP_GET_DEVICE_FD, other));
	MUST(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU));
	FAILS(EINVAL, ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU));
	/* Two groups in one container. */
	MUST(other_group = open_patiently(other_node));
	FAILS(EINVAL, ioctl(other_group, VFIO_GROUP_GET_DEVICE_FD, other));
	MUST(ioctl(other_group, VFIO_GROUP_SET_CONTAINER, &container));
	FAILS(ENODEV, ioctl(other_group, VFIO_GROUP_GET_DEVICE_FD, uuid));
	s = (struct session) { .space = container, .group = other_group };
	MUST(s.device = ioctl(other_group, VFIO_GROUP_GET_DEVICE_FD, other));
	use(&s);
	MUST(close(s.device));
	MUST(close(other_group));
	FAILS(ENOTTY, ioctl(group, _IO(VFIO_TYPE, 99)));
	MUST(ioctl(group, VFIO_GROUP_GET_STATUS, &status));
	/* Hundreds of containers, each with its limits. */
	for (file = 0; file < 300; file++)
		if (open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC) < 0)
			fail(__LINE__, "hundreds of containers", file, errno);
	FAILS(EINVAL, ioctl(file, VFIO_SET_IOMMU, VFIO_TYPE1_IOMMU));
	MUST(close(container));
	MUST(close(group));
}

int main(int argc, char **argv)
{
	if (argc != 5)
		return 2;
	mode = argv[1];
	uuid = argv[3];
	native = !strcmp(mode, "native");
	compat = !strncmp(mode, "compat", 6);
	v1 = !strcmp(mode, "type1") || !strcmp(mode, "compat");
	page = sysconf(_SC_PAGESIZE);
	memory = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(memory != MAP_FAILED);
	find_nodes(uuid, group_node, device_node);
	if (!strcmp(argv[2], "plain"))
		plain();
	else if (!strcmp(argv[2], "threads"))
		threads();
	else if (!strcmp(argv[2], "storm"))
		storm();
	else if (!strcmp(argv[2], "orders"))
		orders();
	else if (!strcmp(argv[2], "fork"))
		forked();
	else if (!strcmp(argv[2], "killed"))
		killed();
	else if (!strcmp(argv[2], "wrong"))
		wrong(argv[4]);
	else
		return 2;
	printf("all is as it should be\n");
	return 0;
}
