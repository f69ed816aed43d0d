//! What every structure and flag word of the ABI needs, written once.

/// Checks size and offsets of a structure at compile time and records how many bytes the kernel insists on.
macro_rules! layout {
    ($ty:ty, size $size:literal, min $min:literal, { $($field:ident $offset:literal),+ $(,)? }) => {
        const _: () = {
            assert!(size_of::<$ty>() == $size);
            assert!($min <= $size);
            $(assert!(core::mem::offset_of!($ty, $field) == $offset);)+
        };
        impl $ty {
            /// Bytes the kernel insists on reading; a smaller size word is `EINVAL`.
            pub const MIN_SIZE: usize = $min;
        }
    };
    ($ty:ty, size $size:literal, { $($field:ident $offset:literal),+ $(,)? }) => {
        const _: () = {
            assert!(size_of::<$ty>() == $size);
            $(assert!(core::mem::offset_of!($ty, $field) == $offset);)+
        };
    };
}

/// A flag word that is plain old data: it can stand in a structure made from any bytes, and unknown bits survive until they are refused.
macro_rules! flags {
    ($(
        $(#[$meta:meta])*
        pub struct $name:ident: $int:ty {
            $($(#[doc = $flag_doc:literal])* const $flag:ident = $value:expr;)*
        }
    )+) => {$(
        $(#[$meta])*
        #[derive(
            Clone, Copy, Default, PartialEq, Eq, Hash,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::KnownLayout, zerocopy::Immutable,
        )]
        #[repr(transparent)]
        pub struct $name($int);

        bitflags::bitflags! {
            impl $name: $int {
                $($(#[doc = $flag_doc])* const $flag = $value;)*
            }
        }

        impl $name {
            /// Whether a bit is set that this ABI does not define.
            #[must_use]
            pub const fn has_unknown_bits(self) -> bool {
                self.0 & !Self::all().bits() != 0
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                if self.0 == 0 {
                    return f.write_str("0");
                }
                bitflags::parser::to_writer(self, f)
            }
        }
    )+};
}

/// Numbers of one kind of file: constants with the kernel's names, and an enum to dispatch on.
macro_rules! ioctls {
    ($(
        $(#[$meta:meta])*
        pub enum $name:ident, base $base:expr, {
            $($(#[$variant_meta:meta])* $variant:ident = $nr:literal, $c_name:ident;)+
        }
    )+) => {$(
        $(
            #[doc = concat!("The command word of `", stringify!($c_name), "`.")]
            pub const $c_name: u32 = io($base + $nr);
        )+

        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum $name {
            $($(#[$variant_meta])* #[doc = concat!("`", stringify!($c_name), "`")] $variant = $c_name,)+
        }

        impl $name {
            /// Every command of this kind of file, by number.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name in the uapi header, for log lines.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => stringify!($c_name),)+
                }
            }

            /// The command word a client passes to `ioctl`.
            #[must_use]
            pub const fn cmd(self) -> u32 {
                self as u32
            }
        }

        impl TryFrom<u32> for $name {
            type Error = UnknownIoctl;

            fn try_from(cmd: u32) -> Result<Self, UnknownIoctl> {
                match cmd {
                    $($c_name => Ok(Self::$variant),)+
                    _ => Err(UnknownIoctl(cmd)),
                }
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str(self.name())
            }
        }
    )+};
}
