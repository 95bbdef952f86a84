
"use strict";
// The page is complete without this: it adds sorting, values of figures at once and by key, and Escape to close an enlarged
// picture.
const superscripts = "⁰¹²³⁴⁵⁶⁷⁸⁹";
function numeric(text) {
  const plain = text.replaceAll(",", "").replaceAll("−", "-").replace(/^[^\d-]+/, "")
    .replace(/ × 10(⁻?)([⁰¹²³⁴⁵⁶⁷⁸⁹]+)/, (_, minus, digits) =>
      "e" + (minus && "-") + [...digits].map((digit) => superscripts.indexOf(digit)).join(""));
  return text === "infinite" ? Infinity : parseFloat(plain);
}
function sort(table, head) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const place = head.cellIndex, words = !head.classList.contains("n");
  const text = (row) => row.cells[place].textContent;
  const missing = (row) => !words && Number.isNaN(numeric(text(row)));
  const order = words
    ? (a, b) => text(a).localeCompare(text(b), "en", { numeric: true })
    : (a, b) => numeric(text(a)) - numeric(text(b)) || 0;
  const rows = [...table.tBodies[0].rows];
  // What was not measured stays at the end, whichever way the others run.
  rows.sort((a, b) => missing(a) - missing(b) || (down ? -1 : 1) * order(a, b));
  table.tBodies[0].append(...rows);
}
for (const table of document.querySelectorAll("table.sortable")) {
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, head));
    head.append(button);
  }
}
// A figure's strips hold its values as titles, which a browser shows after a while; here they show at once, and an invisible
// slider over the figure makes them known to keys and screen readers.
for (const plot of document.querySelectorAll("svg.plot")) {
  const places = [...plot.querySelectorAll(".at")];
  if (!places.length) continue;
  const texts = places.map((place) => place.querySelector("title").textContent);
  for (const title of plot.querySelectorAll("title")) title.remove();
  const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: places.length - 1, value: 0 });
  slider.setAttribute("aria-label", "Values, from left to right");
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("aria-hidden", "true");
  const hide = () => { tip.remove(); for (const place of places) place.classList.remove("on"); };
  const show = (chosen) => {
    hide();
    places[chosen].classList.add("on");
    slider.value = chosen;
    slider.setAttribute("aria-valuetext", texts[chosen].replaceAll("\n", ", "));
    tip.textContent = texts[chosen];
    plot.after(tip);
    const chart = plot.parentElement.getBoundingClientRect(), at = places[chosen].firstElementChild.getBoundingClientRect();
    const middle = at.left + at.width / 2 - chart.left, room = chart.width - tip.offsetWidth;
    tip.style.top = `${at.top - chart.top}px`;
    tip.style.left = `${Math.max(0, middle > chart.width / 2 ? middle - 12 - tip.offsetWidth : Math.min(room, middle + 12))}px`;
  };
  slider.setAttribute("aria-valuetext", texts[0].replaceAll("\n", ", "));
  slider.addEventListener("input", () => show(slider.valueAsNumber));
  slider.addEventListener("focus", () => show(slider.valueAsNumber));
  slider.addEventListener("blur", hide);
  for (const [number, place] of places.entries()) place.addEventListener("pointerenter", () => show(number));
  // A finger leaves when it lifts: what it touched stays until something else is.
  plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
  document.addEventListener("pointerdown", (event) => { if (!plot.contains(event.target)) hide(); });
  plot.parentElement.append(slider);
}
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const open of document.querySelectorAll("details.zoom[open]")) open.open = false;
});
