//! Every link on a page leads to an existing file, and to a heading in it.
//!
//! Links to other sites are not followed: this repository can't keep them valid.

use std::{collections::BTreeMap, path::Path};

use crate::{
    assert_none,
    pages::{pages, root},
};

#[test]
fn every_link_and_anchor_has_a_target() {
    let pages: Pages = pages().into_iter().map(|page| (page.path, page.text)).collect();
    assert_none(&broken(&pages, |path| root().join(path).exists()));
}

#[test]
fn a_missing_file_and_a_missing_anchor_are_found() {
    let page = |text: &str| ("docs/a.md".to_owned(), text.to_owned());
    let other = ("README.md".to_owned(), "# Front\n## Try it\n## Try it\n".to_owned());
    let complaints = |text: &str| {
        let pages = Pages::from([page(text), other.clone()]);
        broken(&pages, |path| ["docs", "docs/a.md", "README.md", "src/lib.rs"].contains(&path))
    };
    for good in [
        "[a](../README.md), [b](../README.md#try-it), [c](../README.md#try-it-1), [d](../src/lib.rs)",
        "# `dtc run`: a *Title*, and more\n[a](#dtc-run-a-title-and-more)",
        "[away](https://example.com/x#y), <https://example.com>, [mail](mailto:a@example.com)",
        "`[code](nowhere.md)`\n```text\n[code](nowhere.md)\n```\n",
        "[r][1]\n\n[1]: ../README.md",
        "<img src=\"../README.md\"><source srcset=\"../src/lib.rs\">",
    ] {
        assert_eq!(complaints(good), [""; 0], "{good}");
    }
    for (bad, complaint) in [
        ("[a](nowhere.md)", "docs/a.md:1: `nowhere.md`: docs/nowhere.md is not there"),
        ("\n![a](no.svg)", "docs/a.md:2: `no.svg`: docs/no.svg is not there"),
        ("[a](#nowhere)", "docs/a.md:1: `#nowhere`: docs/a.md has no such heading"),
        (
            "[a](../README.md#try-it-2)",
            "docs/a.md:1: `../README.md#try-it-2`: README.md has no such heading",
        ),
        ("[r][1]\n[1]: x.md", "docs/a.md:2: `x.md`: docs/x.md is not there"),
        ("<img src=\"x.svg\">", "docs/a.md:1: `x.svg`: docs/x.svg is not there"),
        ("<source srcset=\"y.svg\">", "docs/a.md:1: `y.svg`: docs/y.svg is not there"),
        ("[a](../../x)", "docs/a.md:1: `../../x`: leads out of the repository"),
        (
            "# T\n```\n# In code\n```\n[a](#in-code)",
            "docs/a.md:5: `#in-code`: docs/a.md has no such heading",
        ),
    ] {
        assert_eq!(complaints(bad), [complaint], "{bad}");
    }
}

/// The text of each page, by its path.
type Pages = BTreeMap<String, String>;

fn broken(pages: &Pages, exists: impl Fn(&str) -> bool) -> Vec<String> {
    let mut complaints = Vec::new();
    for (path, text) in pages {
        for (line, link) in links(text) {
            if let Err(complaint) = follow(pages, path, &link, &exists) {
                complaints.push(format!("{path}:{line}: `{link}`: {complaint}"));
            }
        }
    }
    complaints
}

fn follow(
    pages: &Pages,
    from: &str,
    link: &str,
    exists: impl Fn(&str) -> bool,
) -> Result<(), String> {
    if ["http://", "https://", "mailto:"].iter().any(|scheme| link.starts_with(scheme)) {
        return Ok(());
    }
    let (file, anchor) = link.split_once('#').map_or((link, None), |(file, it)| (file, Some(it)));
    let target = if file.is_empty() { from.to_owned() } else { joined(from, file)? };
    if !exists(&target) {
        return Err(format!("{target} is not there"));
    }
    match (anchor, pages.get(&target)) {
        (Some(anchor), Some(text)) if !anchors(text).iter().any(|it| it == anchor) => {
            Err(format!("{target} has no such heading"))
        }
        (Some(_), None) => Err(format!("{target} is no page, and has no headings")),
        _ => Ok(()),
    }
}

/// The path, from the root, of what `file` names on the page `from`.
fn joined(from: &str, file: &str) -> Result<String, String> {
    let directory = Path::new(from).parent().unwrap_or_else(|| Path::new(""));
    let mut names: Vec<_> = directory.iter().map(|name| name.to_str().unwrap()).collect();
    for name in file.split('/') {
        match name {
            "" | "." => {}
            ".." => {
                names.pop().ok_or("leads out of the repository")?;
            }
            name => names.push(name),
        }
    }
    Ok(names.join("/"))
}

/// Every link of a page, with its line: inline ones, images, references, and those in HTML.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut links = Vec::new();
    for (line, prose) in prose(text) {
        let prose = without_code(prose);
        let inline = prose.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        links.extend(inline.map(|link| (line, link.to_owned())));
        if prose.starts_with('[')
            && let Some((_, target)) = prose.split_once("]: ")
        {
            links.push((line, target.trim().to_owned()));
        }
        for attribute in [" href=\"", " src=\"", " srcset=\""] {
            let quoted = prose.split(attribute).skip(1).filter_map(|rest| rest.split('"').next());
            links.extend(quoted.map(|link| (line, link.to_owned())));
        }
    }
    links
}

/// The anchors of a page's headings, as GitHub makes them.
fn anchors(text: &str) -> Vec<String> {
    let mut seen = BTreeMap::new();
    let mut anchors = Vec::new();
    for (_, line) in prose(text) {
        let title = line.trim_start_matches('#');
        if title.len() == line.len() || !title.starts_with(' ') {
            continue;
        }
        let kept = |it: &char| it.is_alphanumeric() || [' ', '-', '_'].contains(it);
        let slug: String = title.trim().to_lowercase().chars().filter(kept).collect();
        let slug = slug.replace(' ', "-");
        let count = seen.entry(slug.clone()).or_insert(0);
        anchors.push(if *count == 0 { slug } else { format!("{slug}-{count}") });
        *count += 1;
    }
    anchors
}

/// The lines that are not in fenced blocks, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut is_open = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        let is_fence = line.trim_start().starts_with("```");
        is_open ^= is_fence;
        (!is_open && !is_fence).then_some((index + 1, line))
    })
}

/// The line without what stands in back-ticks.
fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect::<Vec<_>>().join("``")
}
