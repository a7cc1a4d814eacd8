// A heat-map that is handled by mouse and keyboard. All text is set as text, never as markup.
const STOPS = [[0, 34, 78], [53, 69, 107], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];   // Cividis
function shade(v, low, high) {
  const t = Math.max(0, Math.min(1, high > low ? (v - low) / (high - low) : 1)) * (STOPS.length - 1), i = Math.min(STOPS.length - 2, Math.floor(t));
  return STOPS[i].map((a, k) => Math.round(a + (STOPS[i + 1][k] - a) * (t - i)));
}
const make = (tag, parent, text, attributes) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  for (const [k, v] of Object.entries(attributes || {})) e.setAttribute(k, v);
  if (parent) parent.appendChild(e);
  return e;
};

function render({model, el}) {
  const root = make("div", el, undefined, {class: "se-board", "data-lm-suppress-shortcuts": "true"});      // JupyterLab's own keys stay out
  const table = make("table", root, undefined, {role: "grid"});
  const note = make("output", root, "", {class: "se-note"});
  const ask = make("label", root, "Name of this mask, then Enter: ", {class: "se-ask", hidden: ""}), field = make("input", ask, undefined, {type: "text"});
  const legend = make("div", root, undefined, {class: "se-legend"});
  let cells = [], shape = "", [row, column] = model.get("cursor").map(i => i - 1);

  const say = (r, c) => { note.textContent = ((model.get("grid").notes || [])[r] || [])[c] || ""; };
  const point = (r, c, focus) => {                                             // one cell is in the tab order
    if (!cells[r] || !cells[r][c]) return;
    for (const line of cells) for (const cell of line) cell.tabIndex = -1;
    [row, column] = [r, c]; cells[r][c].tabIndex = 0;
    if (focus) { cells[r][c].focus(); model.set("cursor", [r + 1, c + 1]); model.save_changes(); say(r, c); }
  };
  const press = key => model.send({key, cursor: [row + 1, column + 1]});

  function build(g) {
    table.replaceChildren(); cells = [];
    const head = make("tr", make("thead", table), undefined, {role: "row"}), body = make("tbody", table);
    make("td", head);
    for (const c of g.columns) make("th", head, c.replace(/^head /, ""), {scope: "col", role: "columnheader", "aria-label": c});
    g.rows.forEach((name, r) => {
      const line = make("tr", body, undefined, {role: "row"});
      make("th", line, name, {scope: "row", role: "rowheader"});
      cells.push(g.columns.map((_, c) => {
        const cell = make("td", line, "", {role: "gridcell", tabindex: "-1"});
        cell.addEventListener("click", () => { point(r, c, true); press(" "); });
        cell.addEventListener("mouseenter", () => say(r, c));
        cell.addEventListener("focus", () => { point(r, c, false); say(r, c); });
        return cell;
      }));
    });
  }
  function draw() {
    const g = model.get("grid"), now = JSON.stringify([g.rows, g.columns]);
    if (!g.rows) return;
    if (now !== shape) { build(g); shape = now; }
    table.setAttribute("aria-label", g.title);
    g.values.forEach((line, r) => line.forEach((v, c) => {
      const cell = cells[r][c], missing = v === null, rgb = missing ? null : shade(v, g.low, g.high);
      cell.textContent = missing ? "" : g.texts[r][c];
      cell.style.background = missing ? "" : `rgb(${rgb})`;
      cell.style.color = missing || .299 * rgb[0] + .587 * rgb[1] + .114 * rgb[2] > 125 ? "#000" : "#fff";
      cell.className = (g.edited[r][c] ? "se-edited " : "") + (missing ? "se-missing" : "");
      cell.setAttribute("aria-label", g.notes[r][c]);
      cell.setAttribute("aria-selected", String(g.kept[r][c] === 1));
    }));
    const steps = Array.from({length: 11}, (_, i) => `rgb(${shade(i, 0, 10)})`);
    legend.replaceChildren();
    make("span", legend, g.low.toFixed(2)); make("span", legend, undefined, {class: "se-scale", style: `background:linear-gradient(90deg,${steps})`}); make("span", legend, `${g.high.toFixed(2)}  ${g.label}`);
    point(Math.min(row, cells.length - 1), Math.min(column, cells[0].length - 1), false);
    if (table.contains(document.activeElement)) say(row, column);
  }
  table.addEventListener("keydown", e => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const move = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[e.key];
    if (!move && ![" ", "Enter", "z", "s", "Home", "End"].includes(e.key)) return;
    e.preventDefault(); e.stopPropagation();
    const last = cells[0].length - 1;
    if (move) point(Math.max(0, Math.min(cells.length - 1, row + move[0])), Math.max(0, Math.min(last, column + move[1])), true);
    else if (e.key === "Home" || e.key === "End") point(row, e.key === "Home" ? 0 : last, true);
    else if (e.key === "s") { ask.hidden = false; field.value = ""; field.focus(); }
    else press(e.key);
  });
  field.addEventListener("keydown", e => {
    e.stopPropagation();
    if (e.key === "Enter" && field.value.trim()) press("s " + field.value);
    if (e.key === "Enter" || e.key === "Escape") { e.preventDefault(); ask.hidden = true; point(row, column, true); }
  });
  const moved = () => { const [r, c] = model.get("cursor"); point(r - 1, c - 1, false); };
  model.on("change:grid", draw); model.on("change:cursor", moved);
  draw();
  return () => { model.off("change:grid", draw); model.off("change:cursor", moved); };
}
export default {render};
