// Points in several panels; what is picked in one is picked in all. All text is set as text, never as markup.
const SVG = "http://www.w3.org/2000/svg", SIZE = 270, EDGE = 12;
const SHAPES = {circle: "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0", square: "M-3-3H3V3H-3Z", diamond: "M0-4.5L4 0L0 4.5L-4 0Z", "triangle-up": "M0-4L4 3H-4Z", "triangle-down": "M0 4L4-3H-4Z",
                cross: "M-1.3-4H1.3V-1.3H4V1.3H1.3V4H-1.3V1.3H-4V-1.3H-1.3Z", x: "M-3.5-3.5L3.5 3.5M3.5-3.5L-3.5 3.5", star: "M0-4.5L1.3-1.4L4.3-1.4L1.9 .6L2.7 3.7L0 1.9L-2.7 3.7L-1.9 .6L-4.3-1.4L-1.3-1.4Z"};
const node = (tag, parent, attributes) => {
  const e = document.createElementNS(SVG, tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  parent.appendChild(e);
  return e;
};
const make = (tag, parent, text) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; parent.appendChild(e); return e; };
const glyph = (parent, style, at) => {
  const open = style.symbol.endsWith("-open"), line = style.symbol === "x";
  return node("path", parent, {d: SHAPES[style.symbol.replace("-open", "")], transform: `translate(${at})`, fill: open || line ? "none" : style.color, stroke: open || line ? style.color : "#333", "stroke-width": open || line ? 1.6 : .5});
};

function render({model, el}) {
  const root = make("div", el); root.className = "se-points"; root.setAttribute("data-lm-suppress-shortcuts", "true");
  let marks = [], buttons = [];
  const pick = items => { model.set("picked", [...new Set(items)].sort((a, b) => a - b)); model.save_changes(); };
  function build() {
    const d = model.get("points"); marks = []; buttons = [];
    root.replaceChildren();
    if (!d.panels) return;
    for (const p of d.panels) {
      const figure = make("figure", root); make("figcaption", figure, p.name);
      const svg = node("svg", figure, {width: SIZE, height: SIZE, role: "img", "aria-label": `${p.name}: ${p.x.length} points`});
      const scale = v => { const low = Math.min(...v), wide = Math.max(...v) - low || 1; return v.map(u => EDGE + (u - low) / wide * (SIZE - 2 * EDGE)); };
      const xs = scale(p.x), ys = scale(p.y.map(v => -v));
      xs.forEach((x, i) => { const m = glyph(svg, d.styles[d.of[i]], [x, ys[i]]); node("title", m, {}).textContent = d.texts[i]; marks.push([m, i]); });
      let from = null, box = null;
      const place = e => { const r = svg.getBoundingClientRect(); return [e.clientX - r.left, e.clientY - r.top]; };
      svg.addEventListener("pointerdown", e => { from = place(e); box = node("rect", svg, {fill: "#0072B222", stroke: "#0072B2"}); svg.setPointerCapture(e.pointerId); });
      const corners = to => [Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.max(from[0], to[0]), Math.max(from[1], to[1])];
      svg.addEventListener("pointermove", e => { if (!from) return; const [a, b, c, d2] = corners(place(e)); for (const [k, v] of [["x", a], ["y", b], ["width", c - a], ["height", d2 - b]]) box.setAttribute(k, v); });
      svg.addEventListener("pointerup", e => {
        if (!from) return;
        let [a, b, c, d2] = corners(place(e)); box.remove(); from = null;
        if (c - a < 4 && d2 - b < 4) { a -= 6; b -= 6; c += 6; d2 += 6; }                // a click takes what is near
        pick(xs.map((x, i) => i).filter(i => xs[i] >= a && xs[i] <= c && ys[i] >= b && ys[i] <= d2));
      });
    }
    const legend = make("div", root); legend.setAttribute("role", "group"); legend.setAttribute("aria-label", "Pick by group");
    d.groups.forEach((name, g) => {
      const b = make("button", legend); b.type = "button";
      glyph(node("svg", b, {width: 12, height: 12, "aria-hidden": "true"}), d.styles[g], [6, 6]);
      b.append(" " + name);
      const own = d.of.map((k, i) => [k, i]).filter(([k]) => k === g).map(([, i]) => i);
      b.addEventListener("click", () => { const now = model.get("picked"), all = own.every(i => now.includes(i)); pick(all ? now.filter(i => !own.includes(i)) : [...now, ...own]); });
      buttons.push([b, own]);
    });
    fade();
  }
  function fade() {
    const picked = new Set(model.get("picked"));
    for (const [m, i] of marks) m.setAttribute("opacity", !picked.size || picked.has(i) ? 1 : .12);
    for (const [b, own] of buttons) b.setAttribute("aria-pressed", String(own.length > 0 && own.every(i => picked.has(i))));
  }
  model.on("change:points", build); model.on("change:picked", fade);
  build();
  return () => { model.off("change:points", build); model.off("change:picked", fade); };
}
export default {render};
