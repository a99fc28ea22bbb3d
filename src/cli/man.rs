//! The manual page, udp-fanout(8).
//!
//! One page for all commands, since each has only a few options. `clap_mangen::generate_to` would write a file per command, in
//! section 1 and without our sections, so this combines its parts instead.

use std::io;

use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use super::prose::{DESCRIPTION, SECTIONS};

/// The page in roff, for `man -l -`.
///
/// # Errors
/// None in practice: it is written to memory.
pub fn man() -> io::Result<Vec<u8>> {
    let mut command = super::command().disable_help_subcommand(true);
    command.build();
    let main = Man::new(command.clone()).section("8").manual("System Administration");
    let mut page = Vec::new();
    main.render_title(&mut page)?;
    main.render_name_section(&mut page)?;
    main.render_synopsis_section(&mut page)?;
    description().to_writer(&mut page)?;
    main.render_options_section(&mut page)?;
    commands(&command, &mut page)?;
    sections().to_writer(&mut page)?;
    Ok(without_repeated_definitions(&page))
}

fn description() -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["DESCRIPTION"]);
    for (nth, paragraph) in DESCRIPTION.into_iter().enumerate() {
        if nth > 0 {
            roff.control("PP", []);
        }
        roff.text([roman(paragraph)]);
    }
    roff
}

/// Each command with its description and options.
fn commands(command: &Command, page: &mut Vec<u8>) -> io::Result<()> {
    let mut heading = Roff::new();
    heading.control("SH", ["COMMANDS"]);
    heading.to_writer(page)?;
    for sub in command.get_subcommands() {
        let mut heading = Roff::new();
        heading.control("SS", [sub.get_name()]);
        heading.to_writer(page)?;
        let part = Man::new(sub.clone().mut_arg("help", |help| help.hide(true)));
        page.append(&mut without_heading(&part, Man::render_description_section)?);
        if sub.get_name() == "run" {
            let mut roff = Roff::new();
            roff.control("PP", []);
            roff.text([roman("Takes the options above, before or after its name.")]);
            roff.to_writer(page)?;
        } else {
            page.append(&mut without_heading(&part, Man::render_options_section)?);
        }
    }
    Ok(())
}

/// A section of a command's own page, without the heading line that clap starts it with.
fn without_heading(part: &Man, section: impl Fn(&Man, &mut dyn io::Write) -> io::Result<()>) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    section(part, &mut text)?;
    Ok(lines_where(&text, |line| !line.starts_with(".SH ")))
}

/// Removes repeated definitions of the apostrophe, which every piece of roff begins with.
fn without_repeated_definitions(page: &[u8]) -> Vec<u8> {
    let mut seen = 0;
    lines_where(page, |line| {
        let definition = line.starts_with(".ie \\n(.g .ds Aq") || line.starts_with(".el .ds Aq");
        seen += usize::from(definition);
        !definition || seen <= 2
    })
}

fn lines_where(text: &[u8], mut keep: impl FnMut(&str) -> bool) -> Vec<u8> {
    let text = String::from_utf8_lossy(text);
    text.lines().filter(|line| keep(line)).flat_map(|line| [line, "\n"]).collect::<String>().into()
}

fn sections() -> Roff {
    let mut roff = Roff::new();
    for section in &SECTIONS {
        roff.control("SH", [section.title.to_uppercase().as_str()]);
        for &(term, explanation) in section.entries {
            roff.control("TP", []);
            roff.text([bold(term)]);
            roff.text([roman(explanation)]);
        }
    }
    roff
}
