/*
 * A client of VFIO's character devices and of iommufd as C programs are: written against the
 * kernel's headers only (include/uapi/linux/vfio.h and iommufd.h). It goes through a whole session
 * with an mtty or an mdpy, tries the mistakes a program can make, prints a line for each check, and
 * ends at the first one that fails, with its place.
 *
 *	cdev_client mtty|mdpy IOMMU_NODE DEVICE_NODE [trapped]
 *
 * "trapped" says that regions cannot be mapped on this kernel. After "ready to be removed" an
 * mtty's client waits until the device is asked back.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <linux/iommufd.h>
#include <linux/vfio.h>

/* Newer than some headers: IOMMU_IOAS_MAP_FILE of Linux 6.13. */
#ifndef IOMMU_IOAS_MAP_FILE
struct iommu_ioas_map_file {
	__u32 size, flags, ioas_id;
	__s32 fd;
	__aligned_u64 start, length, iova;
};
#define IOMMU_IOAS_MAP_FILE _IO(IOMMUFD_TYPE, 0x8f)
#endif

#define ACCESS (IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE)
#define FIXED (IOMMU_IOAS_MAP_FIXED_IOVA | ACCESS)

static long page;

static void fail(int line, const char *what, long result, int error)
{
	fflush(stdout);
	fprintf(stderr, "%s:%d: FAILED: %s: %ld, %s\n", __FILE__, line, what, result,
		error ? strerrorname_np(error) : "no errno");
	exit(1);
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

static long must(int line, const char *what, long result, int error)
{
	if (result < 0)
		fail(line, what, result, error);
	printf("ok %d: %s\n", line, what);
	return result;
}

/* errno is read after the call: arguments have no order among themselves. */
#define CHECK(x) check(__LINE__, #x, (x))
#define MUST(x) ({ long r_ = (long)(x); must(__LINE__, #x, r_, errno); })
#define FAILS(want, x) ({ long r_ = (long)(x); fails(__LINE__, #x, want, r_, errno); })

/* `size` bytes at the end of a mapped page; nothing can be read behind them. */
static void *edge(size_t size)
{
	static char *pages;

	if (!pages) {
		pages = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (pages == MAP_FAILED || mprotect(pages + page, page, PROT_NONE))
			exit(2);
	}
	memset(pages, 0, page);
	return pages + page - size;
}

static void *nothing_there(void)
{
	return (char *)edge(0);
}

static void *read_only(const void *from, size_t size)
{
	static char *bytes;

	if (!bytes)
		bytes = mmap(NULL, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (bytes == MAP_FAILED || mprotect(bytes, page, PROT_READ | PROT_WRITE))
		exit(2);
	memcpy(bytes, from, size);
	if (mprotect(bytes, page, PROT_READ))
		exit(2);
	return bytes;
}

/* A descriptor number that is not open, nor will be soon. */
static int closed_fd(void)
{
	int fd = fcntl(0, F_DUPFD, 900);

	close(fd);
	return fd;
}

static int an_eventfd(void)
{
	return eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
}

/* The counter of an eventfd, which is waited for. 0 if nothing comes. */
static uint64_t counted(int fd)
{
	struct pollfd poll_fd = { .fd = fd, .events = POLLIN };
	uint64_t count = 0;

	if (poll(&poll_fd, 1, 10000) != 1 || read(fd, &count, 8) != 8)
		return 0;
	return count;
}

/* True if an eventfd has not been signalled. What this client causes it causes before it returns. */
static int silent(int fd)
{
	uint64_t count;

	return read(fd, &count, 8) == -1 && errno == EAGAIN;
}

/* A command whose first word is its size, in VFIO's dialect: longer ones are taken as they are. */
static void vfio_sizes(int device, unsigned long command, const char *name, void *arg, size_t min,
		       int writes_back)
{
	__u32 *bytes;

	printf("-- sizes of %s\n", name);
	FAILS(EFAULT, ioctl(device, command, NULL));
	FAILS(EFAULT, ioctl(device, command, nothing_there()));
	FAILS(EFAULT, ioctl(device, command, (void *)-8L));
	bytes = edge(min);
	memcpy(bytes, arg, min);
	*bytes = 0;
	FAILS(EINVAL, ioctl(device, command, bytes));
	*bytes = min - 1;
	FAILS(EINVAL, ioctl(device, command, bytes));
	*bytes = min;
	MUST(ioctl(device, command, bytes));
	/* All of it but the last word is there. */
	bytes = edge(min - 4);
	memcpy(bytes, arg, min - 4);
	*bytes = min;
	FAILS(EFAULT, ioctl(device, command, bytes));
	if (writes_back)
		FAILS(EFAULT, ioctl(device, command, read_only(arg, min)));
}

/* Longer arguments, whose rest VFIO's dialect does not look at. */
static void vfio_long(int device, unsigned long command, const char *name, const void *arg,
		      size_t size)
{
	static const __u32 sizes[] = { 1, 64, 4000 };
	static __u32 bytes[2048];
	unsigned n;

	printf("-- longer %s\n", name);
	for (n = 0; n < 3; n++) {
		memset(bytes, 0xff, sizeof(bytes));
		memcpy(bytes, arg, size);
		bytes[0] = size + sizes[n];
		MUST(ioctl(device, command, bytes));
		CHECK(((unsigned char *)bytes)[size] == 0xff);
	}
}

/* The same for iommufd's: longer ones must be zero there, shorter ones have a least size. */
static void iommufd_sizes(int fd, unsigned long command, const char *name, size_t min, size_t size)
{
	__u32 *bytes;

	printf("-- sizes of %s\n", name);
	FAILS(EFAULT, ioctl(fd, command, NULL));
	FAILS(EFAULT, ioctl(fd, command, nothing_there()));
	bytes = edge(size);
	*bytes = 0;
	FAILS(EINVAL, ioctl(fd, command, bytes));
	*bytes = min - 1;
	FAILS(EINVAL, ioctl(fd, command, bytes));
	*bytes = size + 1;
	FAILS(EFAULT, ioctl(fd, command, bytes));
	bytes = edge(size + 8);
	*bytes = size + 8;
	((char *)bytes)[size + 7] = 1;
	FAILS(E2BIG, ioctl(fd, command, bytes));
	/* The first thing met is what counts. */
	*bytes = 0xffffffff;
	FAILS(E2BIG, ioctl(fd, command, bytes));
	bytes = edge(size - 4);
	*bytes = size;
	FAILS(EFAULT, ioctl(fd, command, bytes));
}

static int bind_to(int device, int iommufd, __u32 *id)
{
	struct vfio_device_bind_iommufd bind = { .argsz = 16, .iommufd = iommufd };
	int result = ioctl(device, VFIO_DEVICE_BIND_IOMMUFD, &bind);

	if (!result && id)
		*id = bind.out_devid;
	return result;
}

static int attach_to(int device, __u32 flags, __u32 *pt)
{
	/* With room for the PASID of newer headers. */
	__u32 attach[4] = { 16, flags, *pt, 0 };
	int result = ioctl(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, attach);

	*pt = attach[2];
	return result;
}

static int detach(int device, __u32 flags)
{
	__u32 detach[3] = { 12, flags, 0 };

	return ioctl(device, VFIO_DEVICE_DETACH_IOMMUFD_PT, detach);
}

static int destroy(int iommufd, __u32 id)
{
	struct iommu_destroy destroy = { sizeof(destroy), id };

	return ioctl(iommufd, IOMMU_DESTROY, &destroy);
}

static int map(int iommufd, __u32 ioas, __u32 flags, const void *at, __u64 length, __u64 iova)
{
	struct iommu_ioas_map map = { .size = sizeof(map), .flags = flags, .ioas_id = ioas,
		.user_va = (uintptr_t)at, .length = length, .iova = iova };

	return ioctl(iommufd, IOMMU_IOAS_MAP, &map);
}

static int map_file(int iommufd, __u32 ioas, int fd, __u64 start, __u64 length, __u64 iova)
{
	struct iommu_ioas_map_file map = { .size = sizeof(map), .flags = FIXED, .ioas_id = ioas,
		.fd = fd, .start = start, .length = length, .iova = iova };

	return ioctl(iommufd, IOMMU_IOAS_MAP_FILE, &map);
}

/* The number of bytes, or -1. */
static long unmap(int iommufd, __u32 ioas, __u64 iova, __u64 length)
{
	struct iommu_ioas_unmap unmap = { sizeof(unmap), ioas, iova, length };

	return ioctl(iommufd, IOMMU_IOAS_UNMAP, &unmap) ? -1 : (long)unmap.length;
}

static int copy(int iommufd, __u32 flags, __u32 to, __u32 from, __u64 length, __u64 at, __u64 source)
{
	struct iommu_ioas_copy copy = { sizeof(copy), flags, to, from, length, at, source };

	return ioctl(iommufd, IOMMU_IOAS_COPY, &copy);
}

static __u32 new_ioas(int iommufd)
{
	struct iommu_ioas_alloc alloc = { .size = sizeof(alloc) };

	MUST(ioctl(iommufd, IOMMU_IOAS_ALLOC, &alloc));
	return alloc.out_ioas_id;
}

static int set_irqs(int device, __u32 flags, __u32 index, __u32 start, __u32 count, const void *data,
		    size_t size)
{
	struct { struct vfio_irq_set set; unsigned char data[64]; } arg;

	memset(&arg, 0, sizeof(arg));
	arg.set.argsz = sizeof(arg.set) + size;
	arg.set.flags = flags;
	arg.set.index = index;
	arg.set.start = start;
	arg.set.count = count;
	memcpy(arg.set.data, data ? data : "", size);
	return ioctl(device, VFIO_DEVICE_SET_IRQS, &arg);
}

#define TRIGGER VFIO_IRQ_SET_ACTION_TRIGGER
#define NONE VFIO_IRQ_SET_DATA_NONE
#define BOOL VFIO_IRQ_SET_DATA_BOOL
#define EVENTFD VFIO_IRQ_SET_DATA_EVENTFD
#define INTX VFIO_PCI_INTX_IRQ_INDEX
#define MSI VFIO_PCI_MSI_IRQ_INDEX
#define REQ VFIO_PCI_REQ_IRQ_INDEX

static int trigger_fd(int device, __u32 index, int fd)
{
	return set_irqs(device, EVENTFD | TRIGGER, index, 0, 1, &fd, 4);
}

static int irqs_off(int device, __u32 index)
{
	return set_irqs(device, NONE | TRIGGER, index, 0, 0, NULL, 0);
}

static int unmask_intx(int device)
{
	return set_irqs(device, NONE | VFIO_IRQ_SET_ACTION_UNMASK, INTX, 0, 1, NULL, 0);
}

static int region_info(int device, __u32 index, struct vfio_region_info *info)
{
	memset(info, 0, sizeof(*info));
	info->argsz = sizeof(*info);
	info->index = index;
	return ioctl(device, VFIO_DEVICE_GET_REGION_INFO, info);
}

/* What a region tells about itself; its capabilities by asking again with the size it names. */
static struct vfio_region_info region(int device, __u32 index)
{
	struct vfio_region_info info, *whole;

	MUST(region_info(device, index, &info));
	CHECK(info.cap_offset == 0);
	if (info.argsz == sizeof(info)) {
		CHECK(!(info.flags & VFIO_REGION_INFO_FLAG_CAPS));
		return info;
	}
	CHECK(info.flags & VFIO_REGION_INFO_FLAG_CAPS);
	whole = calloc(1, info.argsz);
	whole->argsz = info.argsz;
	whole->index = index;
	MUST(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, whole));
	CHECK(whole->argsz == info.argsz);
	__u32 at = whole->cap_offset;
	while (at) {
		struct vfio_info_cap_header *cap = (void *)((char *)whole + at);

		CHECK(at >= sizeof(info) && at + sizeof(*cap) <= info.argsz);
		CHECK(cap->id >= 1 && cap->id <= VFIO_REGION_INFO_CAP_MSIX_MAPPABLE + 2);
		CHECK(cap->next == 0 || cap->next > at);
		at = cap->next;
	}
	free(whole);
	return info;
}

static struct vfio_irq_info irq(int device, __u32 index)
{
	struct vfio_irq_info info = { .argsz = sizeof(info), .index = index };

	MUST(ioctl(device, VFIO_DEVICE_GET_IRQ_INFO, &info));
	return info;
}

/* ---- what is the same for every device ---- */

static void before_bind(const char *iommu, const char *node, int device)
{
	static const unsigned long commands[] = { VFIO_DEVICE_GET_INFO, VFIO_DEVICE_GET_REGION_INFO,
		VFIO_DEVICE_GET_IRQ_INFO, VFIO_DEVICE_SET_IRQS, VFIO_DEVICE_RESET,
		VFIO_DEVICE_QUERY_GFX_PLANE, VFIO_DEVICE_FEATURE, VFIO_DEVICE_ATTACH_IOMMUFD_PT,
		VFIO_DEVICE_DETACH_IOMMUFD_PT, _IO(VFIO_TYPE, VFIO_BASE + 99) };
	__u32 token[6] = { 24, 0, 0, 0, 0, 0 };
	__u32 *bytes, id = 0;
	char byte = 0;
	unsigned n;
	int iommufd, other, pipes[2], path, number;

	printf("-- before BIND\n");
	for (n = 0; n < sizeof(commands) / sizeof(*commands); n++)
		FAILS(EINVAL, ioctl(device, commands[n], NULL));
	FAILS(EINVAL, pread(device, &byte, 1, 0));
	FAILS(EINVAL, pwrite(device, &byte, 1, 0));

	printf("-- BIND\n");
	MUST(iommufd = open(iommu, O_RDWR | O_CLOEXEC));
	iommufd_sizes(device, VFIO_DEVICE_BIND_IOMMUFD, "BIND_IOMMUFD", 16, 24);
	FAILS(EINVAL, bind_to(device, -1, &id));
	FAILS(EINVAL, bind_to(device, -0x7fffffff, &id));
	number = closed_fd();
	FAILS(EBADF, bind_to(device, number, &id));
	FAILS(EBADF, bind_to(device, 0x7fffffff, &id));
	MUST(pipe(pipes));
	FAILS(EBADFD, bind_to(device, pipes[0], &id));
	FAILS(EBADFD, bind_to(device, device, &id));
	MUST(path = open(iommu, O_PATH));
	FAILS(EBADF, bind_to(device, path, &id));
	bytes = edge(16);
	bytes[0] = 16;
	bytes[1] = 2;
	bytes[2] = iommufd;
	FAILS(EINVAL, ioctl(device, VFIO_DEVICE_BIND_IOMMUFD, bytes));
	/* A token is for devices that have one. */
	token[1] = 1;
	token[2] = iommufd;
	FAILS(EINVAL, ioctl(device, VFIO_DEVICE_BIND_IOMMUFD, token));
	/* The answer cannot be written: the device is closed and unbound again. */
	token[1] = 0;
	FAILS(EFAULT, ioctl(device, VFIO_DEVICE_BIND_IOMMUFD, read_only(token, 24)));
	FAILS(EINVAL, ioctl(device, VFIO_DEVICE_RESET));

	/* A longer argument is good if the rest is zero; close unbinds, and the next may bind. */
	MUST(other = open(node, O_RDWR | O_CLOEXEC));
	bytes = edge(4000);
	bytes[0] = 4000;
	bytes[2] = iommufd;
	MUST(ioctl(other, VFIO_DEVICE_BIND_IOMMUFD, bytes));
	CHECK(bytes[3] != 0);
	FAILS(EINVAL, bind_to(device, iommufd, &id));
	MUST(close(other));
	FAILS(EBADF, close(other));
	FAILS(EBADF, ioctl(other, VFIO_DEVICE_RESET));
	MUST(bind_to(device, iommufd, &id));
	FAILS(EINVAL, bind_to(device, iommufd, &id));
	MUST(other = open(node, O_RDWR | O_CLOEXEC));
	FAILS(EINVAL, bind_to(other, iommufd, &id));
	FAILS(EINVAL, ioctl(other, VFIO_DEVICE_RESET));
	MUST(close(other));
	/* The context lives as long as what is bound to it. */
	MUST(close(iommufd));
	MUST(ioctl(device, VFIO_DEVICE_RESET));
	close(pipes[0]);
	close(pipes[1]);
	close(path);
}

/* The mistakes that can be made with one iommufd, and the right way between them. */
static void address_space(int iommufd)
{
	static const struct { unsigned long command; const char *name; size_t min, size; } all[] = {
		{ IOMMU_DESTROY, "DESTROY", 8, 8 },
		{ IOMMU_IOAS_ALLOC, "IOAS_ALLOC", 12, 12 },
		{ IOMMU_IOAS_ALLOW_IOVAS, "IOAS_ALLOW_IOVAS", 24, 24 },
		{ IOMMU_IOAS_COPY, "IOAS_COPY", 40, 40 },
		{ IOMMU_IOAS_IOVA_RANGES, "IOAS_IOVA_RANGES", 32, 32 },
		{ IOMMU_IOAS_MAP, "IOAS_MAP", 40, 40 },
		{ IOMMU_IOAS_MAP_FILE, "IOAS_MAP_FILE", 40, 40 },
		{ IOMMU_IOAS_UNMAP, "IOAS_UNMAP", 24, 24 },
		{ IOMMU_OPTION, "OPTION", 24, 24 },
		{ IOMMU_VFIO_IOAS, "VFIO_IOAS", 12, 12 },
		{ IOMMU_GET_HW_INFO, "GET_HW_INFO", 32, 40 },
	};
	struct iommu_ioas_alloc alloc = { sizeof(alloc), 1, 0 };
	struct iommu_iova_range range[2] = { { 0, 0 }, { 7, 7 } };
	struct iommu_ioas_iova_ranges ranges = { .size = sizeof(ranges) };
	struct iommu_ioas_allow_iovas allow = { .size = sizeof(allow) };
	struct iommu_ioas_map automatic = { .size = sizeof(automatic), .flags = ACCESS };
	struct iommu_option option = { .size = sizeof(option) };
	struct iommu_vfio_ioas compat = { .size = sizeof(compat), .op = IOMMU_VFIO_IOAS_GET };
	__u32 ioas, other;
	unsigned n;
	char byte, *memory;
	int memfd, number;

	for (n = 0; n < sizeof(all) / sizeof(*all); n++)
		iommufd_sizes(iommufd, all[n].command, all[n].name, all[n].min, all[n].size);
	printf("-- iommufd: what it is not\n");
	FAILS(ENOTTY, ioctl(iommufd, VFIO_DEVICE_GET_INFO, &byte));
	FAILS(ENOTTY, ioctl(iommufd, VFIO_DEVICE_BIND_IOMMUFD, &byte));
	FAILS(EINVAL, read(iommufd, &byte, 1));
	FAILS(EINVAL, write(iommufd, &byte, 1));
	MUST(ioctl(iommufd, VFIO_GET_API_VERSION) == VFIO_API_VERSION ? 0 : -1);

	printf("-- iommufd: address spaces\n");
	FAILS(EOPNOTSUPP, ioctl(iommufd, IOMMU_IOAS_ALLOC, &alloc));
	ioas = new_ioas(iommufd);
	other = new_ioas(iommufd);
	CHECK(ioas != other);
	FAILS(ENOENT, destroy(iommufd, 0x7fffffff));
	FAILS(ENOENT, destroy(iommufd, 0));

	ranges.ioas_id = ioas;
	FAILS(EMSGSIZE, ioctl(iommufd, IOMMU_IOAS_IOVA_RANGES, &ranges));
	CHECK(ranges.num_iovas == 1);
	ranges.allowed_iovas = (uintptr_t)range;
	ranges.num_iovas = 2;
	MUST(ioctl(iommufd, IOMMU_IOAS_IOVA_RANGES, &ranges));
	CHECK(ranges.num_iovas == 1 && range[0].start == 0 && range[0].last == UINT64_MAX);
	CHECK(range[1].start == 7 && ranges.out_iova_alignment == 1);
	ranges.allowed_iovas = (uintptr_t)nothing_there();
	FAILS(EFAULT, ioctl(iommufd, IOMMU_IOAS_IOVA_RANGES, &ranges));
	ranges.__reserved = 1;
	FAILS(EOPNOTSUPP, ioctl(iommufd, IOMMU_IOAS_IOVA_RANGES, &ranges));
	ranges.__reserved = 0;
	ranges.ioas_id = 0x7fffffff;
	FAILS(ENOENT, ioctl(iommufd, IOMMU_IOAS_IOVA_RANGES, &ranges));

	printf("-- iommufd: MAP and UNMAP\n");
	memory = mmap(NULL, 8 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(map(iommufd, ioas, FIXED, memory, 4 * page, 16 * page));
	FAILS(EEXIST, map(iommufd, ioas, FIXED, memory, page, 16 * page));
	FAILS(EEXIST, map(iommufd, ioas, FIXED, memory, 2 * page, 15 * page));
	FAILS(EEXIST, map(iommufd, ioas, FIXED, memory, 8 * page, 14 * page));
	FAILS(ENOENT, map(iommufd, 0x7fffffff, FIXED, memory, page, 0));
	FAILS(EOPNOTSUPP, map(iommufd, ioas, 8 | FIXED, memory, page, 0));
	FAILS(EINVAL, map(iommufd, ioas, IOMMU_IOAS_MAP_FIXED_IOVA, memory, page, 0));
	FAILS(EINVAL, map(iommufd, ioas, FIXED, memory, 0, 0));
	FAILS(EOVERFLOW, map(iommufd, ioas, FIXED, memory, page, UINT64_MAX));
	FAILS(EOVERFLOW, map(iommufd, ioas, FIXED, memory, UINT64_MAX, 0));
	FAILS(EOVERFLOW, map(iommufd, ioas, FIXED, (void *)-page, 2 * page, 0));
	FAILS(EOVERFLOW, map(iommufd, ioas, FIXED, memory, 2 * page, -page));
	/* Nothing is pinned without a device: an address with nothing behind it is taken. */
	MUST(map(iommufd, ioas, FIXED, nothing_there(), page, 64 * page));
	FAILS(ENOENT, unmap(iommufd, ioas, 16 * page, page));
	FAILS(ENOENT, unmap(iommufd, ioas, 17 * page, 8 * page));
	FAILS(ENOENT, unmap(iommufd, ioas, 0, page));
	FAILS(EINVAL, unmap(iommufd, ioas, 0, 0));
	FAILS(EOVERFLOW, unmap(iommufd, ioas, page, UINT64_MAX));
	FAILS(EOVERFLOW, unmap(iommufd, ioas, UINT64_MAX, page));
	FAILS(ENOENT, unmap(iommufd, 0x7fffffff, 0, page));
	CHECK(unmap(iommufd, ioas, 0, 128 * page) == 5 * page);
	CHECK(unmap(iommufd, ioas, 0, UINT64_MAX) == 0);

	automatic.ioas_id = ioas;
	automatic.user_va = (uintptr_t)memory;
	automatic.length = page;
	MUST(ioctl(iommufd, IOMMU_IOAS_MAP, &automatic));
	CHECK(automatic.iova >= (__u64)page && automatic.iova % page == 0);
	allow.ioas_id = ioas;
	allow.num_iovas = 1;
	allow.allowed_iovas = (uintptr_t)range;
	range[0].start = range[0].last = page;
	FAILS(EINVAL, ioctl(iommufd, IOMMU_IOAS_ALLOW_IOVAS, &allow));
	range[0].start = 256 * page;
	range[0].last = 257 * page - 1;
	MUST(ioctl(iommufd, IOMMU_IOAS_ALLOW_IOVAS, &allow));
	MUST(ioctl(iommufd, IOMMU_IOAS_MAP, &automatic));
	CHECK(automatic.iova == 256 * (__u64)page);
	FAILS(ENOSPC, ioctl(iommufd, IOMMU_IOAS_MAP, &automatic));
	allow.allowed_iovas = (uintptr_t)nothing_there();
	FAILS(EFAULT, ioctl(iommufd, IOMMU_IOAS_ALLOW_IOVAS, &allow));

	printf("-- iommufd: COPY, MAP_FILE\n");
	MUST(map(iommufd, ioas, IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE, memory, 4 * page,
		 32 * page));
	MUST(copy(iommufd, IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE, other, ioas, page, 0,
		  33 * page));
	FAILS(EPERM, copy(iommufd, FIXED, other, ioas, page, page, 33 * page));
	FAILS(ENOENT, copy(iommufd, IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE, other, ioas,
			   8 * page, page, 33 * page));
	FAILS(EINVAL, copy(iommufd, IOMMU_IOAS_MAP_FIXED_IOVA, other, ioas, page, page, 33 * page));
	FAILS(EOPNOTSUPP, copy(iommufd, 16 | FIXED, other, ioas, page, page, 33 * page));
	MUST(memfd = memfd_create("dma", MFD_CLOEXEC));
	MUST(ftruncate(memfd, 4 * page));
	MUST(map_file(iommufd, other, memfd, page, 2 * page, 64 * page));
	FAILS(EEXIST, map_file(iommufd, other, memfd, 0, page, 64 * page));
	number = closed_fd();
	FAILS(EBADF, map_file(iommufd, other, number, 0, page, 128 * page));
	FAILS(EOVERFLOW, map_file(iommufd, other, memfd, -page, 2 * page, 128 * page));
	/* The file need not stay open. */
	MUST(close(memfd));
	CHECK(unmap(iommufd, other, 0, UINT64_MAX) == 3 * page);

	printf("-- iommufd: OPTION, VFIO_IOAS\n");
	option.option_id = IOMMU_OPTION_HUGE_PAGES;
	option.op = IOMMU_OPTION_OP_GET;
	option.object_id = ioas;
	MUST(ioctl(iommufd, IOMMU_OPTION, &option));
	CHECK(option.val64 == 1);
	option.op = IOMMU_OPTION_OP_SET;
	option.val64 = 2;
	FAILS(EINVAL, ioctl(iommufd, IOMMU_OPTION, &option));
	option.object_id = 0x7fffffff;
	FAILS(ENOENT, ioctl(iommufd, IOMMU_OPTION, &option));
	option.object_id = ioas;
	option.op = 7;
	FAILS(EOPNOTSUPP, ioctl(iommufd, IOMMU_OPTION, &option));
	option.option_id = 77;
	FAILS(EOPNOTSUPP, ioctl(iommufd, IOMMU_OPTION, &option));
	FAILS(ENODEV, ioctl(iommufd, IOMMU_VFIO_IOAS, &compat));
	compat.op = IOMMU_VFIO_IOAS_SET;
	compat.ioas_id = other;
	MUST(ioctl(iommufd, IOMMU_VFIO_IOAS, &compat));
	compat.op = IOMMU_VFIO_IOAS_GET;
	compat.ioas_id = 0;
	MUST(ioctl(iommufd, IOMMU_VFIO_IOAS, &compat));
	CHECK(compat.ioas_id == other);
	compat.op = 9;
	FAILS(EOPNOTSUPP, ioctl(iommufd, IOMMU_VFIO_IOAS, &compat));
	/* Mappings do not hold an address space. */
	MUST(destroy(iommufd, ioas));
	FAILS(ENOENT, destroy(iommufd, ioas));
	MUST(destroy(iommufd, other));
	munmap(memory, 8 * page);
}

/* ATTACH and DETACH of a bound device, and what holds what. */
static void attaching(int iommufd, int device, __u32 id)
{
	__u32 attach[4] = { 12, 0, 0, 0 }, detaches[3] = { 8, 0, 0 };
	__u32 ioas = new_ioas(iommufd), other = new_ioas(iommufd), pt;
	struct iommu_ioas_iova_ranges ranges = { .size = sizeof(ranges), .ioas_id = ioas };
	struct iommu_hw_info hw = { .size = sizeof(hw), .dev_id = id };
	char *memory = mmap(NULL, 8 * page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	printf("-- ATTACH\n");
	attach[2] = ioas;
	vfio_sizes(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, "ATTACH_IOMMUFD_PT", attach, 12, 0);
	vfio_long(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, "ATTACH_IOMMUFD_PT", attach, 12);
	vfio_sizes(device, VFIO_DEVICE_DETACH_IOMMUFD_PT, "DETACH_IOMMUFD_PT", detaches, 8, 0);
	vfio_long(device, VFIO_DEVICE_DETACH_IOMMUFD_PT, "DETACH_IOMMUFD_PT", detaches, 8);
	pt = 0x7fffffff;
	FAILS(ENOENT, attach_to(device, 0, &pt));
	pt = id;
	FAILS(ENOENT, attach_to(device, 0, &pt));
	pt = ioas;
	FAILS(EINVAL, attach_to(device, 2, &pt));
	FAILS(EOPNOTSUPP, attach_to(device, 1, &pt));
	FAILS(EINVAL, detach(device, 2));
	FAILS(EOPNOTSUPP, detach(device, 1));
	MUST(attach_to(device, 0, &pt));
	CHECK(pt == ioas);
	FAILS(EBUSY, destroy(iommufd, ioas));
	FAILS(EBUSY, destroy(iommufd, id));
	/* Attaching again replaces; a failure keeps what there was. */
	pt = other;
	MUST(attach_to(device, 0, &pt));
	MUST(destroy(iommufd, ioas));
	pt = ioas;
	FAILS(ENOENT, attach_to(device, 0, &pt));
	FAILS(EBUSY, destroy(iommufd, other));
	/* No page table is shared with an IOMMU: this device has none. */
	FAILS(ENOENT, ioctl(iommufd, IOMMU_GET_HW_INFO, &hw));

	ranges.ioas_id = other;
	FAILS(EMSGSIZE, ioctl(iommufd, IOMMU_IOAS_IOVA_RANGES, &ranges));
	CHECK(ranges.out_iova_alignment >= (__u64)page);
	FAILS(EINVAL, map(iommufd, other, FIXED, memory, page, 1));
	FAILS(EINVAL, map(iommufd, other, FIXED, memory, page - 1, page));
	FAILS(EINVAL, map(iommufd, other, FIXED, memory + 1, page, page));
	MUST(map(iommufd, other, FIXED, memory, 8 * page, 1 << 30));
	CHECK(unmap(iommufd, other, 1 << 30, 8 * page) == 8 * page);
	MUST(map(iommufd, other, FIXED, memory, 8 * page, 1 << 30));

	printf("-- DETACH\n");
	MUST(detach(device, 0));
	MUST(detach(device, 0));
	MUST(destroy(iommufd, other));
	FAILS(EBUSY, destroy(iommufd, id));
	munmap(memory, 8 * page);
}

/* The questions every device answers, asked well and badly. */
static void questions(int device, int migrates)
{
	struct vfio_device_info info = { .argsz = 16 };
	struct vfio_region_info first = { .argsz = sizeof(first), .index = 7 }, bad;
	struct vfio_irq_info first_irq = { .argsz = sizeof(first_irq), .index = 0 };
	struct vfio_irq_info bad_irq = { .argsz = sizeof(bad_irq) };
	struct vfio_device_feature probe = { .argsz = sizeof(probe) };
	__u32 indexes[] = { 9, 100, 0x7fffffff, 0xffffffff };
	struct stat stat;
	unsigned n;
	char byte;

	printf("-- GET_INFO\n");
	vfio_sizes(device, VFIO_DEVICE_GET_INFO, "GET_INFO", &info, 16, 1);
	vfio_long(device, VFIO_DEVICE_GET_INFO, "GET_INFO", &info, sizeof(info));
	MUST(ioctl(device, VFIO_DEVICE_GET_INFO, &info));
	CHECK(info.flags == (VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET));
	CHECK(info.num_regions == VFIO_PCI_NUM_REGIONS && info.num_irqs == VFIO_PCI_NUM_IRQS);
	CHECK(info.argsz == 16);

	printf("-- regions\n");
	vfio_sizes(device, VFIO_DEVICE_GET_REGION_INFO, "GET_REGION_INFO", &first, sizeof(first), 1);
	vfio_long(device, VFIO_DEVICE_GET_REGION_INFO, "GET_REGION_INFO", &first, sizeof(first));
	for (n = 0; n < 4; n++)
		FAILS(EINVAL, region_info(device, indexes[n], &bad));

	printf("-- interrupts\n");
	vfio_sizes(device, VFIO_DEVICE_GET_IRQ_INFO, "GET_IRQ_INFO", &first_irq, 16, 1);
	vfio_long(device, VFIO_DEVICE_GET_IRQ_INFO, "GET_IRQ_INFO", &first_irq, 16);
	indexes[0] = VFIO_PCI_NUM_IRQS;
	for (n = 0; n < 4; n++) {
		bad_irq.index = indexes[n];
		FAILS(EINVAL, ioctl(device, VFIO_DEVICE_GET_IRQ_INFO, &bad_irq));
	}

	printf("-- what is not there\n");
	FAILS(ENOTTY, ioctl(device, _IO(VFIO_TYPE, VFIO_BASE + 99), &byte));
	FAILS(ENOTTY, ioctl(device, IOMMU_IOAS_ALLOC, &byte));
	FAILS(ENOTTY, ioctl(device, VFIO_DEVICE_PCI_HOT_RESET, &byte));
	FAILS(ENOTTY, ioctl(device, VFIO_DEVICE_IOEVENTFD, &byte));
	for (n = 0; n < 12; n++) {
		probe.flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_PROBE | n;
		if (n == VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT) {
			MUST(ioctl(device, VFIO_DEVICE_FEATURE, &probe));
		} else if (n == VFIO_DEVICE_FEATURE_DMA_LOGGING_START || n == VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP) {
			FAILS(EINVAL, ioctl(device, VFIO_DEVICE_FEATURE, &probe));
			probe.flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_PROBE | n;
			MUST(ioctl(device, VFIO_DEVICE_FEATURE, &probe));
		} else if (migrates && (n == VFIO_DEVICE_FEATURE_MIGRATION ||
					n == VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE ||
					n == VFIO_DEVICE_FEATURE_MIG_DATA_SIZE)) {
			MUST(ioctl(device, VFIO_DEVICE_FEATURE, &probe));
		} else {
			FAILS(ENOTTY, ioctl(device, VFIO_DEVICE_FEATURE, &probe));
		}
	}
	FAILS(EFAULT, ioctl(device, VFIO_DEVICE_FEATURE, NULL));
	probe.argsz = 7;
	FAILS(EINVAL, ioctl(device, VFIO_DEVICE_FEATURE, &probe));
	probe.argsz = 8;
	probe.flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_SET | 1;
	FAILS(EINVAL, ioctl(device, VFIO_DEVICE_FEATURE, &probe));
	probe.flags = VFIO_DEVICE_FEATURE_GET | 1 << 19 | 1;
	FAILS(EINVAL, ioctl(device, VFIO_DEVICE_FEATURE, &probe));
	FAILS(EINVAL, ftruncate(device, 0));
	MUST(fstat(device, &stat));
	CHECK((stat.st_mode & 0777) == 0600);
}

/* Reads and writes that are no good; good ones must still work after each. */
static void bad_accesses(int device, const struct vfio_region_info *config)
{
	__u64 end = config->offset + config->size;
	unsigned char byte = 0, bytes[512];

	printf("-- accesses that miss\n");
	FAILS(EFAULT, pread(device, bytes, 1, end));
	FAILS(EFAULT, pread(device, bytes, 2, end - 1));
	FAILS(EFAULT, pread(device, bytes, 512, config->offset));
	FAILS(EFAULT, pwrite(device, bytes, 4, end));
	CHECK(pread(device, &byte, 1, end - 1) == 1);
	CHECK(pread(device, &byte, 0, config->offset) == 0);
	FAILS(EINVAL, pread(device, &byte, 1, (__u64)VFIO_PCI_NUM_REGIONS << 40));
	FAILS(EINVAL, pread(device, &byte, 1, (__u64)0x3fff << 48));
	FAILS(EINVAL, pwrite(device, &byte, 1, (__u64)0x3fff << 48));
	FAILS(EINVAL, pread(device, &byte, 1, -1));
	FAILS(EFAULT, pread(device, nothing_there(), 4, config->offset));
	FAILS(EFAULT, pwrite(device, nothing_there(), 4, config->offset));
}

static __u32 config_read(int device, const struct vfio_region_info *config, unsigned at, unsigned size)
{
	unsigned char bytes[4] = { 0 };

	MUST(pread(device, bytes, size, config->offset + at) == size ? 0 : -1);
	return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | (__u32)bytes[3] << 24;
}

static void config_write(int device, const struct vfio_region_info *config, unsigned at, __u32 value)
{
	unsigned char bytes[4] = { value, value >> 8, value >> 16, value >> 24 };

	MUST(pwrite(device, bytes, 4, config->offset + at) == 4 ? 0 : -1);
}

/* ---- the serial card ---- */

static int card;
static struct vfio_region_info port;

static unsigned char in(unsigned reg)
{
	unsigned char byte = 0;

	MUST(pread(card, &byte, 1, port.offset + reg) == 1 ? 0 : -1);
	return byte;
}

static void out(unsigned reg, unsigned char byte)
{
	MUST(pwrite(card, &byte, 1, port.offset + reg) == 1 ? 0 : -1);
}

enum { DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR };

static void uart_setup(void)
{
	/* It resets to words of five bits. */
	out(LCR, 0x03);
	CHECK(in(LCR) == 0x03);
	out(MCR, 0x08);
	out(IER, 0x01);
}

static void mtty_irq_errors(int device)
{
	struct { struct vfio_irq_set set; __s32 fd; } arg = {
		{ .argsz = 24, .flags = EVENTFD | TRIGGER, .index = INTX, .count = 1 }, -1 };
	int fd = an_eventfd(), closed = closed_fd(), pipes[2], two[2] = { fd, fd }, other = -1;
	unsigned char one = 1;
	void *header;

	printf("-- SET_IRQS, wrongly\n");
	arg.set.index = REQ;
	vfio_sizes(device, VFIO_DEVICE_SET_IRQS, "SET_IRQS with one descriptor", &arg, 24, 0);
	arg.set.index = INTX;
	MUST(pipe(pipes));
	FAILS(EINVAL, set_irqs(device, EVENTFD | TRIGGER, 5, 0, 1, &fd, 4));
	FAILS(EINVAL, set_irqs(device, EVENTFD | TRIGGER, -1, 0, 1, &fd, 4));
	FAILS(EINVAL, set_irqs(device, EVENTFD | TRIGGER, INTX, 1, 1, &fd, 4));
	FAILS(EINVAL, set_irqs(device, EVENTFD | TRIGGER, INTX, 0, 2, two, 8));
	FAILS(EINVAL, set_irqs(device, EVENTFD | TRIGGER, INTX, 1, -1, &fd, 4));
	FAILS(EINVAL, set_irqs(device, EVENTFD | TRIGGER, INTX, -1, 1, &fd, 4));
	FAILS(EINVAL, set_irqs(device, EVENTFD | TRIGGER, INTX, 0, -1, &fd, 4));
	FAILS(EINVAL, set_irqs(device, EVENTFD | TRIGGER, MSI, 1, 1, &fd, 4));
	FAILS(EINVAL, set_irqs(device, EVENTFD | TRIGGER, MSI, 0, 2, two, 8));
	FAILS(EINVAL, set_irqs(device, EVENTFD | TRIGGER, VFIO_PCI_MSIX_IRQ_INDEX, 0, 1, &fd, 4));
	FAILS(EINVAL, set_irqs(device, NONE | TRIGGER, VFIO_PCI_ERR_IRQ_INDEX, 0, 0, NULL, 0));
	FAILS(EINVAL, set_irqs(device, EVENTFD | TRIGGER, INTX, 0, 1, &fd, 3));
	FAILS(EINVAL, set_irqs(device, EVENTFD | TRIGGER, INTX, 0, 1, NULL, 0));
	FAILS(EINVAL, set_irqs(device, EVENTFD | TRIGGER | 64, INTX, 0, 1, &fd, 4));
	FAILS(EINVAL, set_irqs(device, TRIGGER, INTX, 0, 1, &fd, 4));
	FAILS(EINVAL, set_irqs(device, EVENTFD | NONE | TRIGGER, INTX, 0, 1, &fd, 4));
	FAILS(ENOTTY, set_irqs(device, EVENTFD, MSI, 0, 1, &fd, 4));
	FAILS(ENOTTY, set_irqs(device, EVENTFD | TRIGGER | VFIO_IRQ_SET_ACTION_MASK, INTX, 0, 1, &fd, 4));
	FAILS(ENOTTY, set_irqs(device, NONE | VFIO_IRQ_SET_ACTION_MASK, MSI, 0, 1, NULL, 0));
	FAILS(ENOTTY, set_irqs(device, NONE | VFIO_IRQ_SET_ACTION_UNMASK, REQ, 0, 1, NULL, 0));
	FAILS(EBADF, trigger_fd(device, INTX, closed));
	FAILS(EINVAL, trigger_fd(device, INTX, pipes[1]));
	FAILS(EBADF, trigger_fd(device, MSI, closed));
	FAILS(EINVAL, trigger_fd(device, MSI, device));
	FAILS(EBADF, trigger_fd(device, REQ, closed));
	FAILS(EINVAL, trigger_fd(device, REQ, -2));
	/* What is off is neither masked, nor injected, nor switched off. */
	FAILS(EINVAL, unmask_intx(device));
	FAILS(EINVAL, irqs_off(device, INTX));
	FAILS(EINVAL, irqs_off(device, MSI));
	FAILS(EINVAL, set_irqs(device, BOOL | TRIGGER, INTX, 0, 1, &one, 1));
	FAILS(EINVAL, set_irqs(device, NONE | TRIGGER, REQ, 0, 1, NULL, 0));
	/* One kind at a time. */
	MUST(trigger_fd(device, INTX, fd));
	FAILS(EINVAL, trigger_fd(device, MSI, fd));
	/* A bad descriptor leaves the old one. */
	FAILS(EBADF, trigger_fd(device, INTX, closed));
	MUST(set_irqs(device, NONE | TRIGGER, INTX, 0, 1, NULL, 0));
	CHECK(counted(fd) == 1);
	/* Data that is not there. */
	arg.fd = fd;
	header = edge(20);
	memcpy(header, &arg, 20);
	FAILS(EFAULT, ioctl(device, VFIO_DEVICE_SET_IRQS, header));
	MUST(trigger_fd(device, INTX, other));
	MUST(irqs_off(device, INTX));
	CHECK(silent(fd));
	close(fd);
	close(pipes[0]);
	close(pipes[1]);
}

static void mtty_intx(int device)
{
	int fd = an_eventfd(), unmasks = an_eventfd();
	uint64_t one = 1;

	printf("-- a byte and its interrupt, by INTx\n");
	MUST(trigger_fd(device, INTX, fd));
	uart_setup();
	CHECK(silent(fd));
	CHECK(in(IIR) == 0x01 && (in(LSR) & 0x61) == 0x60);
	out(DATA, 0xa5);
	CHECK(counted(fd) == 1);
	CHECK(in(IIR) == 0x04 && (in(LSR) & 0x01));
	CHECK(silent(fd));
	/* It has masked itself; the line is still up, so an unmask fires again. */
	MUST(unmask_intx(device));
	CHECK(counted(fd) == 1);
	MUST(set_irqs(device, BOOL | VFIO_IRQ_SET_ACTION_UNMASK, INTX, 0, 1, "", 1));
	CHECK(silent(fd));
	MUST(set_irqs(device, BOOL | VFIO_IRQ_SET_ACTION_UNMASK, INTX, 0, 1, "\1", 1));
	CHECK(counted(fd) == 1);
	CHECK(in(DATA) == 0xa5);
	CHECK(in(IIR) == 0x01);
	MUST(unmask_intx(device));
	CHECK(silent(fd));
	/* Masked by hand: nothing until it is unmasked. */
	MUST(set_irqs(device, NONE | VFIO_IRQ_SET_ACTION_MASK, INTX, 0, 1, NULL, 0));
	out(DATA, 'b');
	CHECK(silent(fd));
	MUST(unmask_intx(device));
	CHECK(counted(fd) == 1);
	/* Unmasking by an eventfd, as KVM does. */
	MUST(set_irqs(device, EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK, INTX, 0, 1, &unmasks, 4));
	FAILS(EBUSY, set_irqs(device, EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK, INTX, 0, 1, &unmasks, 4));
	FAILS(ENOTTY, set_irqs(device, EVENTFD | VFIO_IRQ_SET_ACTION_MASK, INTX, 0, 1, &unmasks, 4));
	MUST(write(unmasks, &one, 8));
	CHECK(counted(fd) == 1);
	CHECK(in(DATA) == 'b');
	/* Clients close their eventfd first, and switch the interrupt off then. */
	close(fd);
	close(unmasks);
	MUST(irqs_off(device, INTX));
	out(DATA, 'c');
	CHECK(in(DATA) == 'c');
}

static void mtty_msi(int device)
{
	int fd = an_eventfd(), next = an_eventfd(), none = -1;

	printf("-- by MSI\n");
	MUST(trigger_fd(device, MSI, fd));
	CHECK(silent(fd));
	out(DATA, 'd');
	CHECK(counted(fd) == 1);
	CHECK(in(DATA) == 'd');
	out(DATA, 'e');
	CHECK(counted(fd) == 1);
	CHECK(in(DATA) == 'e');
	CHECK(silent(fd));
	/* Injected by the client itself, and into the eventfd that replaced the first. */
	MUST(set_irqs(device, NONE | TRIGGER, MSI, 0, 1, NULL, 0));
	CHECK(counted(fd) == 1);
	MUST(trigger_fd(device, MSI, next));
	MUST(set_irqs(device, BOOL | TRIGGER, MSI, 0, 1, "\1", 1));
	CHECK(counted(next) == 1 && silent(fd));
	MUST(set_irqs(device, BOOL | TRIGGER, MSI, 0, 1, "", 1));
	CHECK(silent(next));
	MUST(set_irqs(device, EVENTFD | TRIGGER, MSI, 0, 1, &none, 4));
	MUST(set_irqs(device, NONE | TRIGGER, MSI, 0, 1, NULL, 0));
	CHECK(silent(next));
	MUST(irqs_off(device, MSI));
	FAILS(EINVAL, irqs_off(device, MSI));
	close(fd);
	close(next);
}

static void mtty(int iommufd, int device, __u32 id)
{
	struct vfio_device_gfx_plane_info plane = { .argsz = sizeof(plane),
		.flags = VFIO_GFX_PLANE_TYPE_PROBE | VFIO_GFX_PLANE_TYPE_REGION };
	struct vfio_region_info config;
	struct vfio_irq_info info;
	unsigned char all[16];
	unsigned n;
	int request = an_eventfd();

	for (n = 0; n < VFIO_PCI_NUM_REGIONS; n++) {
		struct vfio_region_info at = region(device, n);
		__u64 size = n == VFIO_PCI_CONFIG_REGION_INDEX ? 256 : n < 2 ? 8 : 0;

		CHECK(at.size == size);
		CHECK(at.flags == (size ? VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE : 0));
		if (!size && at.offset)
			FAILS(EINVAL, pread(device, all, 1, at.offset));
	}
	for (n = 0; n < VFIO_PCI_NUM_IRQS; n++) {
		/* Errors are for PCI Express to report, which this card is not on. */
		if (n == VFIO_PCI_ERR_IRQ_INDEX) {
			info = (struct vfio_irq_info){ .argsz = sizeof(info), .index = n };
			FAILS(EINVAL, ioctl(device, VFIO_DEVICE_GET_IRQ_INFO, &info));
			continue;
		}
		info = irq(device, n);
		CHECK(info.count == (n != VFIO_PCI_MSIX_IRQ_INDEX));
		CHECK(info.flags == (VFIO_IRQ_INFO_EVENTFD | (n == INTX ?
			VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED : VFIO_IRQ_INFO_NORESIZE)));
	}
	FAILS(ENOTTY, ioctl(device, VFIO_DEVICE_QUERY_GFX_PLANE, &plane));

	printf("-- configuration space\n");
	config = region(device, VFIO_PCI_CONFIG_REGION_INDEX);
	CHECK(config_read(device, &config, 0, 4) == 0x32534348);
	CHECK(config_read(device, &config, 0, 2) == 0x4348 && config_read(device, &config, 2, 2) == 0x3253);
	CHECK(config_read(device, &config, 3, 1) == 0x32 && config_read(device, &config, 0x0b, 1) == 0x07);
	CHECK(config_read(device, &config, 0x3d, 1) == 1);
	config_write(device, &config, 0, 0xffffffff);
	CHECK(config_read(device, &config, 0, 4) == 0x32534348);
	for (n = 0x10; n < 0x28; n += 4) {
		config_write(device, &config, n, 0xffffffff);
		CHECK(config_read(device, &config, n, 4) == (n < 0x18 ? 0xfffffff9 : 0));
	}
	config_write(device, &config, 0x10, 0xc000);
	CHECK(config_read(device, &config, 0x10, 4) == 0xc001);
	bad_accesses(device, &config);

	card = device;
	port = region(device, 0);
	FAILS(EINVAL, pread(device, all, 1, port.offset + 8));
	FAILS(EINVAL, pwrite(device, all, 4, port.offset + 256));
	/* What begins inside ends at the end. */
	CHECK(pread(device, all, 16, port.offset + SCR) == 1);
	mtty_irq_errors(device);
	mtty_intx(device);
	mtty_msi(device);

	printf("-- RESET\n");
	out(IER, 0x0f);
	CHECK(in(IER) == 0x0f && in(LCR) == 0x03);
	MUST(ioctl(device, VFIO_DEVICE_RESET));
	CHECK(in(IER) == 0 && in(LCR) == 0 && in(MCR) == 0);
	CHECK(config_read(device, &config, 0x10, 4) == 0x01);
	/* The interrupts' descriptors are the client's, not the device's. */
	MUST(trigger_fd(device, REQ, request));
	MUST(ioctl(device, VFIO_DEVICE_RESET, 0x1234));
	MUST(set_irqs(device, NONE | TRIGGER, REQ, 0, 1, NULL, 0));
	CHECK(counted(request) == 1);
	MUST(irqs_off(device, REQ));
	FAILS(EINVAL, irqs_off(device, REQ));

	attaching(iommufd, device, id);

	printf("-- a request to leave\n");
	MUST(trigger_fd(device, REQ, request));
	printf("ready to be removed\n");
	fflush(stdout);
	CHECK(counted(request) >= 1);
	/* The device is still whole: it waits for this client. */
	out(SCR, 0x5a);
	CHECK(in(SCR) == 0x5a);
	MUST(close(device));
	FAILS(EBADF, close(device));
}

/* ---- the display ---- */

static void mdpy_mapping(int device, const struct vfio_region_info *frame)
{
	unsigned char *mapped, bytes[64];
	unsigned n;

	printf("-- the framebuffer, mapped\n");
	mapped = mmap(NULL, frame->size, PROT_READ | PROT_WRITE, MAP_SHARED, device, frame->offset);
	MUST(mapped == MAP_FAILED ? -1 : 0);
	for (n = 0; n < frame->size; n += 64 * page) {
		mapped[n] = n >> 12 ^ 0x55;
		CHECK(pread(device, bytes, 1, frame->offset + n) == 1 && bytes[0] == (unsigned char)(n >> 12 ^ 0x55));
	}
	memset(mapped + page - 32, 0xc3, 64);
	CHECK(pread(device, bytes, 64, frame->offset + page - 32) == 64);
	CHECK(bytes[0] == 0xc3 && bytes[63] == 0xc3 && !memcmp(bytes, bytes + 1, 63));
	memset(bytes, 0x3c, 64);
	CHECK(pwrite(device, bytes, 64, frame->offset + frame->size - 64) == 64);
	CHECK(!memcmp(mapped + frame->size - 64, bytes, 64));
	/* A reset draws the first picture again, which the mapping shows. */
	mapped[0] = mapped[1] = 0xff;
	MUST(ioctl(device, VFIO_DEVICE_RESET));
	CHECK(mapped[0] == 0 && mapped[1] == 0);
	MUST(munmap(mapped, frame->size));
}

static void mdpy(int iommufd, int device, __u32 id, const char *node, int trapped)
{
	struct vfio_device_gfx_plane_info plane = { .argsz = sizeof(plane) };
	struct vfio_region_info config, frame;
	unsigned char bytes[8] = { 1, 2, 3, 4, 5, 6, 7, 8 }, back[8] = { 0 }, *mapped;
	__u32 ioas, width, height;
	unsigned n;
	int fd = an_eventfd(), fresh;

	for (n = 0; n < VFIO_PCI_NUM_REGIONS; n++) {
		struct vfio_region_info at = region(device, n);

		if (n == 0 || n == VFIO_PCI_CONFIG_REGION_INDEX)
			CHECK(at.size && (at.flags & ~VFIO_REGION_INFO_FLAG_MMAP) ==
			      (VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE));
		else
			CHECK(at.size == 0 && at.flags == 0);
	}
	for (n = 0; n < VFIO_PCI_NUM_IRQS; n++) {
		struct vfio_irq_info info = irq(device, n);

		CHECK(info.count == 0 && info.flags == 0);
		FAILS(EINVAL, trigger_fd(device, n, fd));
		FAILS(EINVAL, irqs_off(device, n));
	}
	config = region(device, VFIO_PCI_CONFIG_REGION_INDEX);
	frame = region(device, 0);

	printf("-- configuration space\n");
	CHECK(config.size == 256 && config_read(device, &config, 0, 4) == 0x000f1b36);
	config_write(device, &config, 0x10, 0xffffffff);
	CHECK((config_read(device, &config, 0x10, 4) & ~0xfU) == -(__u32)frame.size);
	n = config_read(device, &config, 0x34, 1);
	CHECK(config_read(device, &config, n, 1) == 0x09);
	CHECK(config_read(device, &config, n + 4, 4) == 0x34325258);
	width = config_read(device, &config, n + 8, 4);
	height = config_read(device, &config, n + 12, 4);
	CHECK(width >= 640 && height >= 480 && width * height * 4 <= frame.size);
	bad_accesses(device, &config);

	printf("-- QUERY_GFX_PLANE\n");
	plane.flags = VFIO_GFX_PLANE_TYPE_REGION;
	vfio_sizes(device, VFIO_DEVICE_QUERY_GFX_PLANE, "QUERY_GFX_PLANE", &plane, 60, 1);
	MUST(ioctl(device, VFIO_DEVICE_QUERY_GFX_PLANE, &plane));
	CHECK(plane.width == width && plane.height == height && plane.stride == 4 * width);
	CHECK(plane.drm_format == 0x34325258 && plane.region_index == 0);
	CHECK(plane.size >= plane.stride * height && plane.size <= frame.size);
	plane.flags = VFIO_GFX_PLANE_TYPE_PROBE | VFIO_GFX_PLANE_TYPE_REGION;
	MUST(ioctl(device, VFIO_DEVICE_QUERY_GFX_PLANE, &plane));
	for (n = 0; n < 8; n++)
		if (n != 4 && n != 5) {
			plane.flags = n;
			FAILS(EINVAL, ioctl(device, VFIO_DEVICE_QUERY_GFX_PLANE, &plane));
		}
	plane.flags = VFIO_GFX_PLANE_TYPE_REGION | 8;
	FAILS(EINVAL, ioctl(device, VFIO_DEVICE_QUERY_GFX_PLANE, &plane));

	printf("-- the framebuffer, read and written\n");
	CHECK(pwrite(device, bytes, 7, frame.offset + 4097) == 7);
	CHECK(pread(device, back, 7, frame.offset + 4097) == 7 && !memcmp(bytes, back, 7));
	CHECK(pread(device, back, 1, frame.offset + 4098) == 1 && back[0] == 2);
	FAILS(EFAULT, pread(device, back, 8, frame.offset + frame.size - 4));
	if (trapped) {
		CHECK(!(frame.flags & VFIO_REGION_INFO_FLAG_MMAP));
	} else {
		CHECK(frame.flags & VFIO_REGION_INFO_FLAG_MMAP);
		mdpy_mapping(device, &frame);
	}
	attaching(iommufd, device, id);
	if (!trapped) {
		printf("-- a mapping outlives its descriptor, and holds the device\n");
		mapped = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, device, frame.offset);
		MUST(mapped == MAP_FAILED ? -1 : 0);
		/* A device's memory is no client memory: it cannot be a target of DMA. */
		ioas = new_ioas(iommufd);
		__u32 pt = ioas;
		MUST(attach_to(device, 0, &pt));
		MUST(close(device));
		mapped[0] = 0x77;
		CHECK(mapped[0] == 0x77);
		MUST(fresh = open(node, O_RDWR | O_CLOEXEC));
		FAILS(EINVAL, bind_to(fresh, iommufd, NULL));
		FAILS(EBUSY, destroy(iommufd, ioas));
		MUST(munmap(mapped, page));
		/* Its end is noticed soon, not at once. */
		for (n = 0; bind_to(fresh, iommufd, &id) && n < 500; n++)
			usleep(10000);
		CHECK(n < 500);
		MUST(pread(fresh, back, 1, frame.offset));
		CHECK(back[0] == 0x77);
		MUST(destroy(iommufd, ioas));
		MUST(close(fresh));
	} else {
		MUST(close(device));
	}
	FAILS(EBADF, close(device));
	close(fd);
}

int main(int argc, char **argv)
{
	int device, iommufd, is_mtty;
	__u32 id = 0;

	if (argc < 4)
		return 2;
	/* Everything that was printed counts when it ends somewhere in between. */
	setvbuf(stdout, NULL, _IOLBF, 0);
	page = sysconf(_SC_PAGESIZE);
	is_mtty = !strcmp(argv[1], "mtty");
	MUST(device = open(argv[3], O_RDWR | O_CLOEXEC));
	before_bind(argv[2], argv[3], device);
	MUST(close(device));

	MUST(iommufd = open(argv[2], O_RDWR | O_CLOEXEC));
	address_space(iommufd);
	MUST(device = open(argv[3], O_RDWR | O_CLOEXEC));
	MUST(bind_to(device, iommufd, &id));
	CHECK(id != 0);
	/* A migrating device's state comes by descriptors, for which it takes a supervisor. */
	questions(device, is_mtty && getenv("VFIOCTL_RUN"));
	if (is_mtty)
		mtty(iommufd, device, id);
	else
		mdpy(iommufd, device, id, argv[3], argc > 4);
	MUST(close(iommufd));
	FAILS(EBADF, close(iommufd));
	printf("all is as it should be\n");
	return 0;
}
