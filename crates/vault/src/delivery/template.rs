//! Makes one file of several secrets, with Jinja templates. An unknown word is an error.

use std::collections::BTreeMap;
use std::fmt;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value};
use zeroize::Zeroizing;

/// Largest file that a template may make, in bytes: twice the largest secret.
pub(crate) const MAX_RENDERED_BYTES: usize = 1 << 20;
/// Most steps of the template engine. A page of settings takes some hundred.
const FUEL: u64 = 1_000_000;

/// A text that was found to be a valid template. Its words are checked when it is made.
#[derive(Clone, PartialEq, Eq)]
pub struct Template(String);

/// What is wrong with a template. Contains no value and no line of the template, which may have a password in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// It cannot be read.
    #[error("the template cannot be read{}: {what}", place(*line))]
    Form {
        /// The line, from 1; `None` if unknown.
        line: Option<usize>,
        /// The engine's name for the problem.
        what: String,
    },
    /// It uses a word for which there is no secret.
    #[error("the template uses {0:?}, for which secrets names no secret")]
    Unknown(String),
    /// It cannot be filled in.
    #[error("the template cannot be filled in{}: {what}", place(*line))]
    Render {
        /// The line, from 1; `None` if unknown.
        line: Option<usize>,
        /// The engine's name for the problem.
        what: String,
    },
    /// The file would become too large.
    #[error("the template makes more than {MAX_RENDERED_BYTES} bytes")]
    TooLarge,
}

fn place(line: Option<usize>) -> String {
    line.map(|line| format!(" in its line {line}")).unwrap_or_default()
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Template({} bytes)", self.0.len())
    }
}

impl Template {
    /// Checks that the text is a template and that all its words are among `known`.
    ///
    /// # Errors
    /// [`TemplateError::Form`], [`TemplateError::Unknown`].
    pub fn new<'k>(text: &str, known: impl Iterator<Item = &'k str>) -> Result<Self, TemplateError> {
        let environment = environment();
        let template = environment.template_from_str(text).map_err(|error| form(&error))?;
        let known: Vec<_> = known.collect();
        let is_unknown =
            |word: &String| !known.contains(&word.as_str()) && !environment.globals().any(|(name, _)| name == word);
        match template.undeclared_variables(false).into_iter().filter(is_unknown).min() {
            Some(word) => Err(TemplateError::Unknown(word)),
            None => Ok(Self(text.to_owned())),
        }
    }

    /// Fills in the words.
    ///
    /// # Errors
    /// [`TemplateError::Render`], [`TemplateError::TooLarge`].
    pub fn render(&self, values: &BTreeMap<&str, &str>) -> Result<Zeroizing<Vec<u8>>, TemplateError> {
        let environment = environment();
        let template = environment.template_from_str(&self.0).map_err(|error| form(&error))?;
        let mut file = Bounded(Zeroizing::new(Vec::with_capacity(self.0.len() + 4096)));
        let context: BTreeMap<&str, Value> = values.iter().map(|(word, text)| (*word, Value::from(*text))).collect();
        match template.render_captured_to(Value::from(context), &mut file) {
            Ok(_) => Ok(file.0),
            Err(error) if error.kind() == ErrorKind::WriteFailure => Err(TemplateError::TooLarge),
            Err(error) => {
                let (line, what) = (error.line(), error.kind().to_string());
                Err(TemplateError::Render { line, what })
            }
        }
    }
}

/// Reports the kind and the line of an error. Its detail may quote the text.
fn form(error: &Error) -> TemplateError {
    TemplateError::Form { line: error.line(), what: error.kind().to_string() }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_fuel(Some(FUEL));
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    // Keep the line break at the end of a file.
    if let Ok(syntax) = SyntaxConfig::builder().keep_trailing_newline(true).build() {
        environment.set_syntax(syntax);
    }
    environment.remove_global("debug");
    environment
}

/// A file in the making, limited in size and wiped on drop.
struct Bounded(Zeroizing<Vec<u8>>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_RENDERED_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
