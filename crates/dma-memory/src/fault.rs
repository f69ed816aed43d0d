#![expect(
    unsafe_code,
    reason = "copying memory that can vanish needs machine code and a signal handler"
)]
//! Copies and single accesses that end in an error where the memory has gone.
//!
//! A client may truncate its file under our mapping; touching the lost pages is SIGBUS. Every access to
//! such memory is one of the few instructions below, and the handler for SIGBUS (and SIGSEGV) makes a
//! fault in one of them return "failed" instead. A fault anywhere else goes to whoever handled the signal
//! before. The handler is installed with the first mapping, for the whole process. A thread that touches
//! such memory must not block these signals: the kernel kills a process that faults with them blocked.

use std::ffi::c_int;
use std::ffi::c_void;
use std::sync::Once;
use std::sync::OnceLock;

use rustix::io::Errno;

/// The memory ended before the access did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Bytes that were copied before.
    pub done: usize,
}

impl From<Fault> for Errno {
    fn from(_: Fault) -> Self {
        Errno::FAULT
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the memory ended after {} bytes", self.done)
    }
}

impl std::error::Error for Fault {}

/// 1, 2, 4 or 8 bytes that are read or written by one instruction: atomically if aligned.
pub trait Scalar: Copy + sealed::Sealed {
    /// Bytes.
    const SIZE: usize = size_of::<Self>();
    #[doc(hidden)]
    const LOAD: unsafe extern "C" fn(*const c_void, *mut c_void) -> c_int;
    #[doc(hidden)]
    const STORE: unsafe extern "C" fn(*mut c_void, u64) -> c_int;
    #[doc(hidden)]
    const ZERO: Self;
    #[doc(hidden)]
    fn widen(self) -> u64;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! scalar {
    ($($t:ty, $load:ident, $store:ident);*) => {$(
        impl sealed::Sealed for $t {}
        impl Scalar for $t {
            const LOAD: unsafe extern "C" fn(*const c_void, *mut c_void) -> c_int = $load;
            const STORE: unsafe extern "C" fn(*mut c_void, u64) -> c_int = $store;
            const ZERO: Self = 0;
            fn widen(self) -> u64 {
                u64::from(self)
            }
        }
    )*};
}

scalar! {
    u8, dma_memory_load_1, dma_memory_store_1;
    u16, dma_memory_load_2, dma_memory_store_2;
    u32, dma_memory_load_4, dma_memory_store_4;
    u64, dma_memory_load_8, dma_memory_store_8
}

/// Copies `len` bytes; either side may be memory that vanishes meanwhile.
///
/// # Safety
/// Both ranges stay mapped or reserved for the call (they may be past the end of their file), the
/// destination is writable as far as the mapping goes and nothing of Rust's is in it but a buffer that
/// the caller holds `&mut`. [`install`] has been called.
///
/// # Errors
/// [`Fault`] with the bytes that were copied.
pub(crate) unsafe fn copy(dst: *mut u8, src: *const u8, len: usize) -> Result<(), Fault> {
    // SAFETY: passed on to the caller; the routine touches nothing else, and a fault in it comes back
    // as the number of bytes that are left.
    let left = unsafe { dma_memory_copy(dst.cast(), src.cast(), len) };
    if left == 0 {
        Ok(())
    } else {
        Err(Fault {
            done: len.saturating_sub(left),
        })
    }
}

/// Reads one value with one instruction.
///
/// # Safety
/// As [`copy`], for the source.
///
/// # Errors
/// [`Fault`]: nothing is there any more.
pub(crate) unsafe fn load<S: Scalar>(src: *const u8) -> Result<S, Fault> {
    let mut value = S::ZERO;
    // SAFETY: passed on to the caller for `src`; `value` is ours and as large as the routine writes.
    let failed = unsafe { S::LOAD(src.cast(), (&raw mut value).cast()) };
    if failed == 0 {
        Ok(value)
    } else {
        Err(Fault { done: 0 })
    }
}

/// Writes one value with one instruction.
///
/// # Safety
/// As [`copy`], for the destination.
///
/// # Errors
/// [`Fault`]: nothing is there any more.
pub(crate) unsafe fn store<S: Scalar>(dst: *mut u8, value: S) -> Result<(), Fault> {
    // SAFETY: passed on to the caller.
    let failed = unsafe { S::STORE(dst.cast(), value.widen()) };
    if failed == 0 {
        Ok(())
    } else {
        Err(Fault { done: 0 })
    }
}

unsafe extern "C" {
    /// Returns the bytes that were not copied.
    fn dma_memory_copy(dst: *mut c_void, src: *const c_void, len: usize) -> usize;
    // Each returns 0, or 1 after a fault.
    fn dma_memory_load_1(src: *const c_void, value: *mut c_void) -> c_int;
    fn dma_memory_load_2(src: *const c_void, value: *mut c_void) -> c_int;
    fn dma_memory_load_4(src: *const c_void, value: *mut c_void) -> c_int;
    fn dma_memory_load_8(src: *const c_void, value: *mut c_void) -> c_int;
    fn dma_memory_store_1(dst: *mut c_void, value: u64) -> c_int;
    fn dma_memory_store_2(dst: *mut c_void, value: u64) -> c_int;
    fn dma_memory_store_4(dst: *mut c_void, value: u64) -> c_int;
    fn dma_memory_store_8(dst: *mut c_void, value: u64) -> c_int;

    // A fault from `begin` up to `end` continues at `end`, which returns failure.
    static dma_memory_copy_begin: u8;
    static dma_memory_copy_end: u8;
    static dma_memory_access_begin: u8;
    static dma_memory_access_end: u8;
}

// The direction flag is clear at every call (System V ABI). A fault inside `rep movsb` leaves rcx at the
// number of bytes that are left, and so does the loop for short copies, for which `rep` starts too slowly.
// Long copies go by 4 KiB, with what is left behind the piece in r8: processors fetch ahead within a page
// only, so the start of the next piece is asked for before this one is copied. A prefetch never faults.
#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    ".text",
    ".p2align 6",
    ".globl dma_memory_copy",
    ".hidden dma_memory_copy",
    ".type dma_memory_copy, @function",
    "dma_memory_copy:",
    "mov rcx, rdx",
    "xor r8d, r8d",
    ".globl dma_memory_copy_begin",
    ".hidden dma_memory_copy_begin",
    "dma_memory_copy_begin:",
    "cmp rcx, 64",
    "ja 5f",
    "2:",
    "sub rcx, 8",
    "jb 3f",
    "add rcx, 8",
    "mov rax, [rsi]",
    "mov [rdi], rax",
    "add rsi, 8",
    "add rdi, 8",
    "sub rcx, 8",
    "jmp 2b",
    "3:",
    "add rcx, 8",
    "jz 6f",
    "4:",
    "mov al, [rsi]",
    "mov [rdi], al",
    "inc rsi",
    "inc rdi",
    "dec rcx",
    "jnz 4b",
    "jmp 6f",
    "5:",
    "cmp rcx, 8192",
    "jb 8f",
    "mov r8, rcx",
    "7:",
    ".set dma_memory_line, 4096",
    ".rept 32",
    "prefetcht0 [rsi + dma_memory_line]",
    ".set dma_memory_line, dma_memory_line + 64",
    ".endr",
    "sub r8, 4096",
    "mov ecx, 4096",
    "rep movsb",
    "cmp r8, 8192",
    "jae 7b",
    "mov rcx, r8",
    "xor r8d, r8d",
    "8:",
    "rep movsb",
    "6:",
    ".globl dma_memory_copy_end",
    ".hidden dma_memory_copy_end",
    "dma_memory_copy_end:",
    "lea rax, [rcx + r8]",
    "ret",
    ".size dma_memory_copy, . - dma_memory_copy",
    ".globl dma_memory_access_begin",
    ".hidden dma_memory_access_begin",
    "dma_memory_access_begin:",
    ".irp width, 1, 2, 4, 8",
    ".globl dma_memory_load_\\width",
    ".hidden dma_memory_load_\\width",
    ".globl dma_memory_store_\\width",
    ".hidden dma_memory_store_\\width",
    ".endr",
    "dma_memory_load_1:",
    "mov al, [rdi]",
    "mov [rsi], al",
    "xor eax, eax",
    "ret",
    "dma_memory_load_2:",
    "mov ax, [rdi]",
    "mov [rsi], ax",
    "xor eax, eax",
    "ret",
    "dma_memory_load_4:",
    "mov eax, [rdi]",
    "mov [rsi], eax",
    "xor eax, eax",
    "ret",
    "dma_memory_load_8:",
    "mov rax, [rdi]",
    "mov [rsi], rax",
    "xor eax, eax",
    "ret",
    "dma_memory_store_1:",
    "mov [rdi], sil",
    "xor eax, eax",
    "ret",
    "dma_memory_store_2:",
    "mov [rdi], si",
    "xor eax, eax",
    "ret",
    "dma_memory_store_4:",
    "mov [rdi], esi",
    "xor eax, eax",
    "ret",
    "dma_memory_store_8:",
    "mov [rdi], rsi",
    "xor eax, eax",
    "ret",
    ".globl dma_memory_access_end",
    ".hidden dma_memory_access_end",
    "dma_memory_access_end:",
    "mov eax, 1",
    "ret",
);

// x2 counts what is left, and is lowered only after the bytes have been stored.
#[cfg(target_arch = "aarch64")]
std::arch::global_asm!(
    ".text",
    ".p2align 6",
    ".globl dma_memory_copy",
    ".hidden dma_memory_copy",
    ".type dma_memory_copy, %function",
    "dma_memory_copy:",
    ".globl dma_memory_copy_begin",
    ".hidden dma_memory_copy_begin",
    "dma_memory_copy_begin:",
    "2:",
    "cmp x2, #32",
    "b.lo 3f",
    "ldp x3, x4, [x1]",
    "ldp x5, x6, [x1, #16]",
    "stp x3, x4, [x0]",
    "stp x5, x6, [x0, #16]",
    "add x1, x1, #32",
    "add x0, x0, #32",
    "sub x2, x2, #32",
    "b 2b",
    "3:",
    "cbz x2, 4f",
    "ldrb w3, [x1]",
    "strb w3, [x0]",
    "add x1, x1, #1",
    "add x0, x0, #1",
    "sub x2, x2, #1",
    "b 3b",
    "4:",
    ".globl dma_memory_copy_end",
    ".hidden dma_memory_copy_end",
    "dma_memory_copy_end:",
    "mov x0, x2",
    "ret",
    ".size dma_memory_copy, . - dma_memory_copy",
    ".globl dma_memory_access_begin",
    ".hidden dma_memory_access_begin",
    "dma_memory_access_begin:",
    ".irp width, 1, 2, 4, 8",
    ".globl dma_memory_load_\\width",
    ".hidden dma_memory_load_\\width",
    ".globl dma_memory_store_\\width",
    ".hidden dma_memory_store_\\width",
    ".endr",
    "dma_memory_load_1:",
    "ldrb w2, [x0]",
    "strb w2, [x1]",
    "mov w0, #0",
    "ret",
    "dma_memory_load_2:",
    "ldrh w2, [x0]",
    "strh w2, [x1]",
    "mov w0, #0",
    "ret",
    "dma_memory_load_4:",
    "ldr w2, [x0]",
    "str w2, [x1]",
    "mov w0, #0",
    "ret",
    "dma_memory_load_8:",
    "ldr x2, [x0]",
    "str x2, [x1]",
    "mov w0, #0",
    "ret",
    "dma_memory_store_1:",
    "strb w1, [x0]",
    "mov w0, #0",
    "ret",
    "dma_memory_store_2:",
    "strh w1, [x0]",
    "mov w0, #0",
    "ret",
    "dma_memory_store_4:",
    "str w1, [x0]",
    "mov w0, #0",
    "ret",
    "dma_memory_store_8:",
    "str x1, [x0]",
    "mov w0, #0",
    "ret",
    ".globl dma_memory_access_end",
    ".hidden dma_memory_access_end",
    "dma_memory_access_end:",
    "mov w0, #1",
    "ret",
);

/// Who handled SIGBUS and SIGSEGV before.
static PREVIOUS_BUS: OnceLock<libc::sigaction> = OnceLock::new();
static PREVIOUS_SEGV: OnceLock<libc::sigaction> = OnceLock::new();

/// Installs the handler, once. Whoever replaces it later must pass on what is not theirs.
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for (signal, previous) in [
            (libc::SIGBUS, &PREVIOUS_BUS),
            (libc::SIGSEGV, &PREVIOUS_SEGV),
        ] {
            // SAFETY: all-zero bytes are a valid sigaction: default action, no flags, empty mask.
            let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: asks for the current action and writes it to `old`.
            unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut old) };
            // Kept before the handler can run.
            let _ = previous.set(old);
            let mut new = old;
            let handler: unsafe extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_fault;
            new.sa_sigaction = handler as usize;
            // On the alternate stack, so that a previous handler for stack overflow still works.
            new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | (old.sa_flags & libc::SA_NODEFER);
            // SAFETY: `on_fault` has the signature that SA_SIGINFO asks for and touches only what a
            // signal handler may.
            unsafe { libc::sigaction(signal, &raw const new, std::ptr::null_mut()) };
        }
    });
}

/// # Safety
/// Called by the kernel as a SA_SIGINFO handler.
unsafe extern "C" fn on_fault(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a ucontext_t and a siginfo_t that are ours until we return.
    let (pc, code) = unsafe { (&mut *program_counter(context.cast()), (*info).si_code) };
    // A positive code comes from the kernel: a real fault, not somebody's kill().
    if code > 0
        && let Some(end) = recovery(*pc)
    {
        *pc = end;
        return;
    }
    let previous = if signal == libc::SIGBUS {
        PREVIOUS_BUS.get()
    } else {
        PREVIOUS_SEGV.get()
    };
    match previous {
        Some(old) if !matches!(old.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN) => {
            // SAFETY: the address is the handler that was installed before ours, with the signature
            // that its flags tell.
            unsafe {
                if old.sa_flags & libc::SA_SIGINFO == 0 {
                    let handler: extern "C" fn(c_int) = std::mem::transmute(old.sa_sigaction);
                    handler(signal);
                } else {
                    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                        std::mem::transmute(old.sa_sigaction);
                    handler(signal, info, context);
                }
            }
        }
        // An ignored signal that somebody sent stays ignored.
        Some(old) if old.sa_sigaction == libc::SIG_IGN && code <= 0 => {}
        _ => {
            // SAFETY: the default action; the faulting instruction runs again and ends the process. A
            // signal that was only sent is sent again.
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
                if code <= 0 {
                    libc::raise(signal);
                }
            }
        }
    }
}

/// Where to go on after a fault at `pc`, if it is one of ours.
fn recovery(pc: Register) -> Option<Register> {
    let copy = (
        &raw const dma_memory_copy_begin,
        &raw const dma_memory_copy_end,
    );
    let access = (
        &raw const dma_memory_access_begin,
        &raw const dma_memory_access_end,
    );
    [copy, access]
        .map(|(begin, end)| (begin as Register, end as Register))
        .into_iter()
        .find(|(begin, end)| (*begin..*end).contains(&pc))
        .map(|(_, end)| end)
}

#[cfg(target_arch = "x86_64")]
type Register = i64;
#[cfg(target_arch = "aarch64")]
type Register = u64;

/// # Safety
/// `context` is what the kernel passed to a signal handler.
#[cfg(target_arch = "x86_64")]
unsafe fn program_counter(context: *mut libc::ucontext_t) -> *mut Register {
    // SAFETY: inside the kernel's ucontext_t.
    unsafe { &raw mut (*context).uc_mcontext.gregs[libc::REG_RIP as usize] }
}

/// # Safety
/// `context` is what the kernel passed to a signal handler.
#[cfg(target_arch = "aarch64")]
unsafe fn program_counter(context: *mut libc::ucontext_t) -> *mut Register {
    // SAFETY: inside the kernel's ucontext_t.
    unsafe { &raw mut (*context).uc_mcontext.pc }
}
