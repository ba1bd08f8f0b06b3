//! The page: frames and curves as HTML that needs nothing but itself.

use std::fmt::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::{Look, Shown, bounds};

const STYLE: &str = "body{font:14px/1.4 system-ui,sans-serif;margin:1.5em;color:#222;\
background:#fafafa}h1{font-size:1.4em}h2{font-size:1.1em;margin:1.6em 0 .2em}\
.row{display:flex;gap:4px;overflow-x:auto;margin:4px 0}figure{margin:0}\
img{height:128px;display:block}figcaption{font-size:11px;color:#666}.fault{color:#b00}\
.words{font-style:italic}table{border-collapse:collapse}td,th{padding:2px 8px;text-align:left;\
font-weight:normal;vertical-align:top}svg{background:#fff;border:1px solid #ddd}small{color:#666}";
/// Size of a curve.
const WIDTH: f32 = 420.0;
const HEIGHT: f32 = 56.0;

pub(super) fn html(look: &Look) -> String {
    let mut page =
        String::from("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">");
    let name = escaped(&look.name);
    let mut put = |text: String| page.push_str(&text);
    put(format!(
        "<title>{name}</title><style>{STYLE}</style></head>\n<body><h1>{name}</h1>\n"
    ));
    put(format!("<p>{}</p>\n", escaped(&look.summary())));
    for shown in &look.shown {
        put(episode(look, shown));
    }
    put("</body></html>\n".into());
    page
}

fn episode(look: &Look, shown: &Shown) -> String {
    let mut text = String::new();
    let mut put = |part: String| text.push_str(&part);
    put(format!(
        "<section><h2>{}</h2>\n",
        escaped(&shown.title(look))
    ));
    put(format!(
        "<p class=\"words\">{}</p>\n",
        escaped(&shown.instruction)
    ));
    for fault in shown.faults(look) {
        put(format!("<p class=\"fault\">{}</p>\n", escaped(&fault)));
    }
    for (camera, (role, _)) in look.cameras.iter().enumerate() {
        put(format!(
            "<small>{}</small><div class=\"row\">",
            escaped(role)
        ));
        for picture in &shown.pictures {
            let time = look.time(picture.frame);
            let image = picture.images[camera]
                .as_ref()
                .map_or(String::new(), |jpeg| {
                    let data = STANDARD.encode(jpeg);
                    format!("<img alt=\"{time}\" src=\"data:image/jpeg;base64,{data}\">")
                });
            put(format!(
                "<figure>{image}<figcaption>{time}, frame {}</figcaption></figure>",
                picture.frame
            ));
        }
        put("</div>\n".into());
    }
    put("<table><tr><th>action</th><th>as trained on, raw</th><th>normalised</th></tr>\n".into());
    for (dim, dimension) in look.dimensions.iter().enumerate() {
        let (raw, normalised) = (shown.raw(dim), shown.normalised(dim));
        let [low, high] = bounds(&raw);
        put(format!(
            "<tr><td>{}<br><small>{low:.4} to {high:.4}</small></td><td>{}</td><td>{}</td></tr>\n",
            escaped(&look.label(dimension)),
            curve(&raw, [low, high], "#145aaa"),
            curve(&normalised, [-1.0, 1.0], "#be5014")
        ));
    }
    put("</table></section>\n".into());
    text
}

/// Draws a curve; a value that is no number leaves a gap.
fn curve(values: &[f32], [low, high]: [f32; 2], color: &str) -> String {
    let mut svg = format!("<svg width=\"{WIDTH}\" height=\"{HEIGHT}\">");
    let last = values.len().saturating_sub(1).max(1) as f32;
    let mut number = 0;
    for run in values.chunk_by(|a, b| a.is_finite() == b.is_finite()) {
        if run[0].is_finite() {
            let points = run.iter().enumerate().map(|(at, value)| {
                let x = (number + at) as f32 / last * WIDTH;
                let share = ((value - low) / (high - low)).clamp(0.0, 1.0);
                format!("{x:.1},{:.1}", 2.0 + (1.0 - share) * (HEIGHT - 4.0))
            });
            let points: Vec<String> = points.collect();
            write!(
                svg,
                "<polyline fill=\"none\" stroke=\"{color}\" points=\"{}\"/>",
                points.join(" ")
            )
            .expect("a String takes all");
        }
        number += run.len();
    }
    svg + "</svg>"
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup_and_gaps_stay_gaps() {
        assert_eq!(escaped("<b a=\"1\">&"), "&lt;b a=&quot;1&quot;&gt;&amp;");
        let svg = curve(&[0.0, 1.0, f32::NAN, 1.0, 0.0], [0.0, 1.0], "red");
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(
            svg.contains("0.0,54.0 105.0,2.0") && !svg.contains("NaN"),
            "{svg}"
        );
    }
}
