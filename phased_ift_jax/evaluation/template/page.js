"use strict";
// Filters of the examples; without them all are shown, which needs no script.
document.documentElement.classList.add("js");
const examples = [...document.querySelectorAll(".example")];
if (examples.length) {
  const [set, verdict, search, count, more] = ["set", "verdict", "search", "count", "more"].map((id) => document.getElementById(id));
  const texts = examples.map((example) => example.textContent.toLowerCase());
  const PAGE = 20;
  let room = PAGE;
  const show = () => {
    const wanted = search.value.trim().toLowerCase();
    let found = 0;
    examples.forEach((example, i) => {
      const fits = (!set.value || example.dataset.set === set.value) && (!verdict.value || example.dataset.verdict === verdict.value) && texts[i].includes(wanted);
      found += fits;
      example.hidden = !fits || found > room;
    });
    count.textContent = `${Math.min(found, room)} of ${found} shown`;
    more.hidden = found <= room;
  };
  for (const control of [set, verdict, search]) control.addEventListener("input", () => { room = PAGE; show(); });
  more.addEventListener("click", () => { room += 5 * PAGE; show(); });
  show();
}
