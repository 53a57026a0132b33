//! Flame graphs: where processor time goes, as one SVG file that a browser shows, with nothing else needed.
//!
//! Each box is a function, as wide as the part of the samples that were in it or in what it called; what it called stands on it. Colours
//! mean nothing: the same name has the same one. A click takes a box for the whole width, `Search` marks names.
//!
//! It is written here because the crate that cargo's flame graphs are made with is under the CDDL, and is larger than this.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};

use crate::control::report::Samples;

/// In pixels: the whole width, what is left free beside, above and below, and a box's height.
const WIDTH: f64 = 1200.0;
const SIDE: f64 = 10.0;
const TOP: u32 = 50;
const BOTTOM: u32 = 35;
const ROW: u32 = 16;
/// A character's width.
const LETTER: f64 = 7.0;
/// Boxes narrower than this are left out.
const LEAST: f64 = 0.1;

const SCRIPT: &str = r"
const boxes=[...document.querySelectorAll('g.f')],info=document.getElementById('info'),found=document.getElementById('found');
const num=(g,k)=>+g.dataset[k];
function show(x,w,d){for(const g of boxes){const a=Math.max(0,(num(g,'x')-x)/w),b=Math.min(1,(num(g,'x')+num(g,'w')-x)/w);
const [r,t]=[g.querySelector('rect'),g.querySelector('text')],px=(b-a)*1180;g.style.display=px<0.1?'none':'';
r.setAttribute('x',10+a*1180);r.setAttribute('width',Math.max(0,px));t.setAttribute('x',13+a*1180);
g.style.opacity=num(g,'d')<d?0.5:1;const n=g.dataset.n,k=Math.floor((px-6)/7);t.textContent=k<3?'':n.length<=k?n:n.slice(0,k-2)+'..';}}
for(const g of boxes){g.addEventListener('click',()=>show(num(g,'x'),num(g,'w'),num(g,'d')));
g.addEventListener('mouseover',()=>{info.textContent=g.querySelector('title').textContent;});
g.addEventListener('mouseout',()=>{info.textContent=' ';});}
document.getElementById('reset').addEventListener('click',()=>show(0,1,0));
document.getElementById('search').addEventListener('click',()=>{const word=prompt('Mark the functions whose names have','');if(word===null)return;
let end=0,sum=0;const marked=boxes.filter(g=>word!==''&&g.dataset.n.includes(word));
for(const g of boxes){const r=g.querySelector('rect');r.setAttribute('fill',marked.includes(g)?'rgb(230,0,230)':r.dataset.c);}
for(const g of marked.sort((a,b)=>num(a,'x')-num(b,'x')||num(a,'d')-num(b,'d'))){if(num(g,'x')>=end-1e-12){sum+=num(g,'w');end=num(g,'x')+num(g,'w');}}
found.textContent=word===''?'':'marked: '+(100*sum).toFixed(1)+' %';});
";

/// A function where it was called.
#[derive(Debug, Default)]
struct Call<'a> {
    /// In it and in what it called.
    ticks: u64,
    calls: BTreeMap<&'a str, Self>,
}

impl<'a> Call<'a> {
    fn add(&mut self, way: impl Iterator<Item = &'a str>, ticks: u64) {
        self.ticks = self.ticks.saturating_add(ticks);
        let mut at = self;
        for name in way {
            at = at.calls.entry(name).or_default();
            at.ticks = at.ticks.saturating_add(ticks);
        }
    }
}

/// A box: its name, how deep it is, where it begins and how wide it is, as parts of the whole.
struct Frame<'a> {
    name: &'a str,
    depth: u32,
    x: f64,
    width: f64,
    ticks: u64,
}

/// All boxes that can be seen, callers first.
fn frames<'a>(root: &'a Call<'_>) -> Vec<Frame<'a>> {
    let mut all = Vec::new();
    let mut open = vec![("all", root, 0, 0_u64)];
    #[expect(clippy::cast_precision_loss, reason = "parts of a picture")]
    let part = |ticks: u64| ticks as f64 / root.ticks.max(1) as f64;
    while let Some((name, call, depth, from)) = open.pop() {
        let (x, width) = (part(from), part(call.ticks));
        if width * (WIDTH - 2.0 * SIDE) < LEAST {
            continue;
        }
        all.push(Frame { name, depth, x, width, ticks: call.ticks });
        let mut next = from;
        for (name, called) in &call.calls {
            open.push((name, called, depth + 1, next));
            next += called.ticks;
        }
    }
    all
}

/// Warm, and the same for the same name.
fn colour(name: &str) -> String {
    let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(name);
    let [red, green, blue, ..] = hash.to_le_bytes();
    format!("rgb({},{},{})", 200 + red % 55, 60 + green % 160, blue % 60)
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // Nothing that XML does not have (XML 1.0, production 2).
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => {}
            c => out.push(c),
        }
    }
    out
}

/// As much of a name as there is room for.
fn shortened(name: &str, width: f64) -> String {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "letters in a box")]
    let room = ((width - 6.0) / LETTER).max(0.0) as usize;
    match (room, name.chars().count()) {
        (0..3, _) => String::new(),
        (room, letters) if letters <= room => name.to_owned(),
        (room, _) => name.chars().take(room - 2).chain("..".chars()).collect(),
    }
}

/// The graph. Each brane is a box of its own on the lowest one.
#[must_use]
pub fn svg(samples: &Samples, title: &str) -> String {
    let mut root = Call::default();
    let folded: Vec<_> = samples.branes.iter().map(|brane| (brane.name.as_str(), brane.stacks.folded())).collect();
    for (brane, stacks) in &folded {
        for (way, ticks) in stacks {
            root.add([*brane].into_iter().chain(way.iter().copied()), *ticks);
        }
    }
    let frames = frames(&root);
    let deepest = frames.iter().map(|frame| frame.depth).max().unwrap_or(0);
    let height = TOP + BOTTOM + (deepest + 1) * ROW;
    let mut out = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"monospace\" font-size=\"12\">\n\
         <style>g.f{{cursor:pointer}} g.f:hover rect{{stroke:black}} text{{fill:black}} text.b{{cursor:pointer;fill:#555}}</style>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff8ee\"/>\n\
         <text x=\"{}\" y=\"24\" font-size=\"17\" text-anchor=\"middle\">{}</text>\n\
         <text id=\"reset\" class=\"b\" x=\"{SIDE}\" y=\"24\">Reset</text>\n\
         <text id=\"search\" class=\"b\" x=\"{}\" y=\"24\" text-anchor=\"end\">Search</text>\n",
        WIDTH / 2.0,
        escaped(title),
        WIDTH - SIDE,
    );
    for Frame { name, depth, x, width, ticks } in &frames {
        let (left, wide) = (SIDE + x * (WIDTH - 2.0 * SIDE), width * (WIDTH - 2.0 * SIDE));
        let top = height - BOTTOM - (depth + 1) * ROW;
        let (name_, colour) = (escaped(name), colour(name));
        let _ = writeln!(
            out,
            "<g class=\"f\" data-x=\"{x:.9}\" data-w=\"{width:.9}\" data-d=\"{depth}\" data-n=\"{name_}\"><title>{name_} ({ticks} samples, {:.2} %)</title>\
             <rect x=\"{left:.2}\" y=\"{top}\" width=\"{wide:.2}\" height=\"{}\" rx=\"2\" fill=\"{colour}\" data-c=\"{colour}\"/>\
             <text x=\"{:.2}\" y=\"{}\">{}</text></g>",
            width * 100.0,
            ROW - 1,
            left + 3.0,
            top + ROW - 4,
            escaped(&shortened(name, wide)),
        );
    }
    let y = height - 12;
    let _ = write!(
        out,
        "<text id=\"info\" x=\"{SIDE}\" y=\"{y}\"> </text>\n<text id=\"found\" x=\"{}\" y=\"{y}\" text-anchor=\"end\"> </text>\n\
         <script><![CDATA[{SCRIPT}]]></script>\n</svg>\n",
        WIDTH - SIDE,
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::report::Sampled;
    use crate::stacks::{Node, Stacks};
    use proptest::prelude::*;

    fn samples(names: &[&str], ticks: &[u64]) -> Samples {
        let node = |(at, ticks): (usize, &u64)| {
            let caller = at.checked_sub(1).map(|caller| u32::try_from(caller).unwrap());
            Node { caller, name: u32::try_from(at).unwrap(), ticks: *ticks }
        };
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        let stacks = Stacks { names, nodes: ticks.iter().enumerate().map(node).collect(), ..Stacks::default() };
        Samples { time_ns: 0, tick_ns: 1, branes: vec![Sampled { name: "burn".into(), stacks }] }
    }

    #[test]
    fn each_function_has_a_box_with_its_part() {
        let svg = svg(&samples(&["handle<T>", "spin"], &[1, 99]), "burn & more");
        for part in [
            ">all (100 samples, 100.00 %)<",
            ">burn (100 samples, 100.00 %)<",
            ">handle&lt;T&gt; (100 samples, 100.00 %)<",
            ">spin (99 samples, 99.00 %)<",
            ">burn &amp; more<",
        ] {
            assert!(svg.contains(part), "{part} is not in {svg}");
        }
    }

    #[test]
    fn nothing_sampled_is_a_graph_without_boxes() {
        assert!(!svg(&samples(&[], &[]), "nothing").contains("<g "));
    }

    proptest! {
        #[test]
        fn names_stay_texts(name in "\\PC{1,40}", ticks in 1_u64..1 << 40) {
            let svg = svg(&samples(&[&name, "</script><svg onload='x'>"], &[ticks, ticks]), &name);
            prop_assert_eq!(svg.matches("<g ").count(), svg.matches("</g>").count());
            prop_assert_eq!((svg.matches("<script>").count(), svg.matches("<svg").count()), (1, 1));
            prop_assert_eq!(svg.matches("<title>").count(), svg.matches("<rect x").count());
        }
    }
}
