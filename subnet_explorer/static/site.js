// Draws the figures of a page in the colours of its theme; sorts and filters its tables. Nothing is fetched.
"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)");

function draw() {
  if (typeof Plotly === "undefined") return;
  const style = getComputedStyle(document.documentElement), fg = style.getPropertyValue("--fg").trim();
  for (const box of document.querySelectorAll(".plot")) {
    const text = box.parentElement.querySelector("script[type='application/json']").textContent
      .replaceAll(/"(rgb\(36, ?36, ?36\)|#000000|#333333)"/g, JSON.stringify(fg)).replaceAll('"white"', '"rgba(0,0,0,0)"');
    const figure = JSON.parse(text);
    Plotly.react(box, figure.data, figure.layout, {displayModeBar: false});
  }
}

function value(cell) {
  const raw = cell.dataset.v ?? cell.textContent.trim(), number = raw === "" ? NaN : Number(raw);
  return Number.isNaN(number) ? raw : number;
}

function sort(head) {
  const table = head.closest("table"), body = table.tBodies[0], at = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const h of table.tHead.rows[0].cells) if (h.hasAttribute("aria-sort")) h.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...body.rows].map(r => [value(r.cells[at]), r]);
  rows.sort(([a], [b]) => {                                    // what is missing stays last
    if (a === "" || b === "") return (a === "") - (b === "");
    const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", {numeric: true});
    return down ? -order : order;
  });
  body.append(...rows.map(([, r]) => r));
}

function filter(form) {
  const table = document.getElementById(form.dataset.table), rows = [...table.tBodies[0].rows];
  const words = form.elements.search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = [...form.querySelectorAll("select")].filter(s => s.value).map(s => [Number(s.dataset.column), s.value]);
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    const marks = JSON.parse(row.dataset.f);
    row.hidden = !(words.every(w => text.includes(w)) && wanted.every(([at, v]) => marks[at] === v));
    shown += !row.hidden;
  }
  form.querySelector("output").textContent = `${shown} of ${rows.length} shown`;
}

for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => sort(button.closest("th")));
for (const form of document.querySelectorAll("form.filters")) {
  form.hidden = false;
  form.addEventListener("input", () => filter(form));
  form.addEventListener("reset", () => setTimeout(() => filter(form)));
  form.addEventListener("submit", e => e.preventDefault());
  filter(form);
}
dark.addEventListener("change", draw);
draw();
