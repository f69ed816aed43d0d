//! How a port's backend is written in configuration and on command lines.

use std::fmt;
use std::path::Path;
use std::path::PathBuf;
use std::str::FromStr;

/// Where a port's bytes go, as somebody wrote it. [`Display`](fmt::Display) writes the form that
/// [`FromStr`] reads:
///
/// | written | meaning |
/// |---|---|
/// | `loopback` | what is sent is received, as in the kernel's sample |
/// | `pty`, `pty:/link` | a terminal made for the port; with a symbolic link to it |
/// | `unix:/path` | a stream socket that listens there, one client at a time |
/// | `file:/out`, `file:/out,in=/in` | output appended to one file, input from another |
/// | `stdio` | the program's standard input and output |
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BackendSpec {
    /// The port hears itself.
    #[default]
    Loopback,
    /// A pseudo-terminal made for the port.
    Pty {
        /// Where a symbolic link to the terminal is put.
        link: Option<PathBuf>,
    },
    /// A listening socket.
    Unix {
        /// Where it listens.
        path: PathBuf,
    },
    /// Files.
    File {
        /// What the guest sends is appended here.
        output: PathBuf,
        /// What the guest receives, from the start at each open of the device; then silence.
        input: Option<PathBuf>,
    },
    /// Standard input and output.
    Stdio,
}

/// Why a text is not a [`BackendSpec`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// The word before the colon is none of ours.
    #[error(
        "unknown serial backend {0:?}; use loopback, pty, pty:/link, unix:/path, \
         file:/out[,in=/in] or stdio"
    )]
    Unknown(String),
    /// A backend that needs a path has none.
    #[error("the {0} backend needs a path, as in {0}:/some/where")]
    MissingPath(&'static str),
    /// A backend that has no argument was given one.
    #[error("the {0} backend takes no argument, but {1:?} was given")]
    Unexpected(&'static str, String),
    /// The daemon has no useful current directory.
    #[error("{0:?} must be an absolute path")]
    Relative(String),
    /// No file can have this name.
    #[error("{0:?} contains a NUL byte")]
    Nul(String),
    /// Something after the comma that is not `in=`.
    #[error("unknown option {0:?} of the file backend; the only one is in=/path")]
    Option(String),
    /// The form of [`BackendSpec`] cannot carry it.
    #[error("{0:?}: a path with a comma cannot be written here")]
    Comma(String),
}

impl FromStr for BackendSpec {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let (kind, argument) = match text.split_once(':') {
            Some((kind, argument)) => (kind, Some(argument)),
            None => (text, None),
        };
        let none = |kind, spec| match argument {
            None => Ok(spec),
            Some(given) => Err(ParseError::Unexpected(kind, given.to_owned())),
        };
        match kind {
            "loopback" => none("loopback", Self::Loopback),
            "stdio" => none("stdio", Self::Stdio),
            "pty" => Ok(Self::Pty {
                link: argument.map(absolute).transpose()?,
            }),
            "unix" => Ok(Self::Unix {
                path: absolute(argument.ok_or(ParseError::MissingPath("unix"))?)?,
            }),
            "file" => {
                let argument = argument.ok_or(ParseError::MissingPath("file"))?;
                let (output, options) = match argument.split_once(',') {
                    Some((output, options)) => (output, Some(options)),
                    None => (argument, None),
                };
                if output.is_empty() {
                    return Err(ParseError::MissingPath("file"));
                }
                let input = match options.map(|o| (o, o.strip_prefix("in="))) {
                    None => None,
                    Some((_, Some(path))) if path.contains(',') => {
                        return Err(ParseError::Comma(path.to_owned()));
                    }
                    Some((_, Some(path))) => Some(absolute(path)?),
                    Some((other, None)) => return Err(ParseError::Option(other.to_owned())),
                };
                Ok(Self::File {
                    output: absolute(output)?,
                    input,
                })
            }
            _ => Err(ParseError::Unknown(text.to_owned())),
        }
    }
}

fn absolute(path: &str) -> Result<PathBuf, ParseError> {
    if path.contains('\0') {
        Err(ParseError::Nul(path.to_owned()))
    } else if !Path::new(path).is_absolute() {
        Err(ParseError::Relative(path.to_owned()))
    } else {
        Ok(PathBuf::from(path))
    }
}

impl fmt::Display for BackendSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loopback => f.write_str("loopback"),
            Self::Pty { link: None } => f.write_str("pty"),
            Self::Pty { link: Some(link) } => write!(f, "pty:{}", link.display()),
            Self::Unix { path } => write!(f, "unix:{}", path.display()),
            Self::File {
                output,
                input: None,
            } => write!(f, "file:{}", output.display()),
            Self::File {
                output,
                input: Some(input),
            } => write!(f, "file:{},in={}", output.display(), input.display()),
            Self::Stdio => f.write_str("stdio"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn forms() {
        for (text, spec) in [
            ("loopback", BackendSpec::Loopback),
            ("stdio", BackendSpec::Stdio),
            ("pty", BackendSpec::Pty { link: None }),
            (
                "pty:/run/tty0",
                BackendSpec::Pty {
                    link: Some("/run/tty0".into()),
                },
            ),
            (
                "unix:/run/a:b",
                BackendSpec::Unix {
                    path: "/run/a:b".into(),
                },
            ),
            (
                "file:/a",
                BackendSpec::File {
                    output: "/a".into(),
                    input: None,
                },
            ),
            (
                "file:/a,in=/b",
                BackendSpec::File {
                    output: "/a".into(),
                    input: Some("/b".into()),
                },
            ),
        ] {
            assert_eq!(text.parse(), Ok(spec.clone()), "{text}");
            assert_eq!(spec.to_string(), text);
        }
    }

    #[test]
    fn mistakes() {
        use ParseError as E;
        for (text, error) in [
            ("", E::Unknown(String::new())),
            ("tty:/x", E::Unknown("tty:/x".into())),
            ("PTY", E::Unknown("PTY".into())),
            ("unix", E::MissingPath("unix")),
            ("unix:", E::Relative(String::new())),
            ("unix:x", E::Relative("x".into())),
            ("unix:/a\0b", E::Nul("/a\0b".into())),
            ("pty:x", E::Relative("x".into())),
            ("file", E::MissingPath("file")),
            ("file:,in=/b", E::MissingPath("file")),
            ("file:/a,", E::Option(String::new())),
            ("file:/a,out=/b", E::Option("out=/b".into())),
            ("file:/a,in=b", E::Relative("b".into())),
            ("file:/a,in=/b,in=/c", E::Comma("/b,in=/c".into())),
            ("stdio:/x", E::Unexpected("stdio", "/x".into())),
            ("loopback:", E::Unexpected("loopback", String::new())),
        ] {
            assert_eq!(text.parse::<BackendSpec>(), Err(error), "{text:?}");
        }
        let told = "serial".parse::<BackendSpec>().unwrap_err().to_string();
        assert!(
            told.contains("\"serial\"") && told.contains("unix:/path"),
            "{told}"
        );
    }

    proptest! {
        /// What is read can be written, and reads the same again.
        #[test]
        fn round_trip(text in "(loopback|pty|unix|file|stdio)?:?[/a,=in:\0 ]{0,12}") {
            if let Ok(spec) = text.parse::<BackendSpec>() {
                prop_assert_eq!(spec.to_string().parse(), Ok(spec));
            }
        }
    }
}
